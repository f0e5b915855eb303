import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES, Case, relative_error
from tiny_flow import apply, batch, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.flow import inverse, sampling
from tarflow_jax.flow.model import patchify, unpatchify

TAGS = ('g_ab', 'g_a', 'g_b', 'g_anneal', 'g_temp', 'g_temp_anneal')
TARGETS = {'ab': 'both', 'a': 'log_scale', 'b': 'shift'}


def official_guidance(kwargs: str) -> tfj.Guidance:
    k = json.loads(kwargs)
    return tfj.Guidance(
        weight=k['guidance'],
        target=TARGETS[k['guide_what']],
        temperature=k.get('attn_temp', 1.0),
        annealed=k.get('annealed_guidance', False),
    )


@pytest.mark.parametrize('name', CASES)
def test_unguided_samples_and_every_step_of_them_agree_with_the_official_code(name):
    case = Case(name)
    model, noise, labels = case.model, case.sequence('noise'), case.labels()
    assert relative_error(
        tfj.sample(model, case.variables, noise, labels), case.images('sample')
    ) < 1e-4
    trajectory = tfj.sample_trajectory(model, case.variables, noise, labels)
    for i, x in enumerate(trajectory):
        images = unpatchify(jnp.asarray(x), model.patch_size, model.image_size)
        assert relative_error(images, case.images(f'sequence_{i}')) < 1e-4


@pytest.mark.parametrize('tag', TAGS)
@pytest.mark.parametrize('name', CASES)
def test_guided_samples_agree_with_the_official_code(name, tag):
    case = Case(name)
    guidance = official_guidance(str(case[f'kwargs_{tag}']))
    noise, labels = case.sequence('noise'), case.labels()
    if labels is None and guidance.temperature == 1:
        # Both branches are the same network: the official code returns the unguided sample.
        with pytest.raises(ValueError, match='temperature'):
            tfj.sample(case.model, case.variables, noise, labels, guidance=guidance)
        guidance = None
    found = tfj.sample(case.model, case.variables, noise, labels, guidance=guidance)
    assert relative_error(found, case.images(f'sample_{tag}')) < 1e-4


def test_it_inverts_the_flow():
    model = tiny(layers_per_block=(2, 1, 2))
    variables, (images, labels) = perturbed(model), batch(model)
    z, _ = apply(model, variables, images, labels)
    assert np.abs(tfj.sample(model, variables, z, labels) - images).max() < 1e-5
    trajectory = tfj.sample_trajectory(model, variables, z, labels)
    forward, _ = apply(model, variables, images, labels, method='trajectory')
    for found, wanted in zip(trajectory, [*forward[::-1], patchify(images, 2)]):
        assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize('guidance', [None, tfj.Guidance(1.3, temperature=0.7, annealed=True)])
def test_the_cache_changes_nothing(guidance):
    # The inverse written without a cache: each position from a whole forward pass.
    model = tiny()
    variables, (_, labels) = perturbed(model), batch(model)
    noise = jax.random.normal(jax.random.key(3), (3, model.num_patches, model.patch_dim))
    x = noise
    for b in (1, 0):
        block, params = model.block_module(b), variables['params'][f'block_{b}']
        predict = jax.jit(functools.partial(block.apply, {'params': params}, reverse=bool(b)))
        z = x[:, ::-1] if b else x
        x = z
        for t in range(1, model.num_patches):
            a, m = predict(x, labels)
            if guidance is not None:
                a_u, m_u = predict(x, None, temperature=0.7)
                w = 1.3 * t / (model.num_patches - 1)
                a, m = a + w * (a - a_u), m + w * (m - m_u)
            x = x.at[:, t].set(z[:, t] * jnp.exp(a[:, t]) + m[:, t])
        x = x[:, ::-1] if b else x
    wanted = unpatchify(x, model.patch_size, model.image_size)
    found = tfj.sample(model, variables, noise, labels, guidance=guidance)
    assert np.abs(found - wanted).max() < 1e-5


def test_volume_preserving_noise_is_scaled_by_the_prior():
    case = Case('vp_cond')
    noise, labels = case.sequence('noise'), case.labels()
    wide = {**case.variables, 'prior': {'variance': 4 * case.variables['prior']['variance']}}
    np.testing.assert_allclose(
        tfj.sample(case.model, wide, noise, labels),
        tfj.sample(case.model, case.variables, 2 * noise, labels),
        atol=1e-5,
    )


def test_bfloat16_samples_are_close():
    variables = perturbed(tiny())
    noise = jax.random.normal(jax.random.key(3), (3, 16, 8))
    wanted = tfj.sample(tiny(), variables, noise)
    found = tfj.sample(tiny(dtype=jnp.bfloat16), variables, noise)
    assert found.dtype == jnp.float32
    assert 1e-5 < relative_error(found, wanted) < 0.05


def test_blocks_of_one_depth_share_one_program():
    # Of a width that no other test uses, so that nothing is compiled yet.
    model = tiny(layers_per_block=(2, 2, 1, 2), width=48)
    before = inverse.invert_block._cache_size()
    noise = jnp.zeros((2, model.num_patches, model.patch_dim))
    tfj.sample(model, perturbed(model), noise)
    assert inverse.invert_block._cache_size() - before == 2


def test_weights_and_temperatures_share_one_program():
    model = tiny(width=80)
    variables, noise = perturbed(model), jnp.zeros((2, model.num_patches, model.patch_dim))
    labels = jnp.zeros(2, int)
    before = inverse.invert_block._cache_size()
    for guidance in (tfj.Guidance(1.0), tfj.Guidance(2.0, temperature=0.5, annealed=True)):
        tfj.sample(model, variables, noise, labels, guidance=guidance)
    assert inverse.invert_block._cache_size() - before == len({*model.layers_per_block})


def test_it_runs_inside_jit():
    model = tiny()
    variables, (_, labels) = perturbed(model), batch(model)
    noise = jax.random.normal(jax.random.key(3), (3, model.num_patches, model.patch_dim))
    found = jax.jit(lambda v, z, y: tfj.sample(model, v, z, y))(variables, noise, labels)
    np.testing.assert_allclose(found, tfj.sample(model, variables, noise, labels), atol=1e-5)


class TestRedraws:
    """Samples that are not finite, made by noise that overflows."""

    model = tiny()

    def draw(self, bad, count=5, **kwargs):
        noise = jax.random.normal(jax.random.key(3), (count, 16, 8))
        noise = noise.at[np.array(bad, int)].set(jnp.inf)
        return tfj.sample(
            self.model, perturbed(self.model), noise, jnp.arange(count) % 3, return_info=True,
            **kwargs,
        )

    def test_only_the_failed_ones_are_drawn_again(self):
        clean, _ = self.draw([])
        images, info = self.draw([1, 3, 4], key=jax.random.key(9))
        assert np.isfinite(images).all()
        np.testing.assert_array_equal(info.redraws, [0, 1, 0, 1, 1])
        np.testing.assert_array_equal(images[np.array([0, 2])], clean[np.array([0, 2])])
        fresh = images[np.array([1, 3, 4])]
        assert np.abs(fresh - clean[np.array([1, 3, 4])]).min(0).max() > 0.1
        assert np.abs(fresh[0] - fresh[1]).max() > 0.1

    def test_they_are_what_their_noise_alone_gives(self):
        one, _ = self.draw([3], key=jax.random.key(9))
        many, _ = self.draw([1, 3, 4], key=jax.random.key(9))
        np.testing.assert_allclose(one[3], many[3], atol=1e-5)

    def test_without_a_key_they_stay(self):
        images, info = self.draw([2])
        assert not np.isfinite(images[2]).all()
        assert info.redraws.sum() == 0

    def test_it_gives_up(self):
        broken = jax.tree.map(lambda x: x * jnp.nan, perturbed(self.model))
        images, info = tfj.sample(
            self.model, broken, jnp.zeros((2, 16, 8)), key=jax.random.key(0), return_info=True
        )
        assert not np.isfinite(images).any()
        np.testing.assert_array_equal(info.redraws, [sampling.MAX_REDRAWS] * 2)


@pytest.mark.parametrize(
    'kwargs, words',
    [
        ({'noise': np.zeros((2, 15, 8))}, r'\(2, 15, 8\)'),
        ({'labels': np.array([0, 5])}, 'label 5 is outside 0..2'),
        ({'labels': np.array([0, 1, 2])}, r'labels have shape \(3,\)'),
        ({'method': 'psychic'}, "method 'psychic'.*sequential"),
        ({'guidance': tfj.Guidance(1.0)}, 'labels or a temperature'),
    ],
)
def test_arguments_that_do_not_fit(kwargs, words):
    model = tiny()
    arguments = {'noise': np.zeros((2, 16, 8)), **kwargs}
    with pytest.raises(ValueError, match=words):
        tfj.sample(model, perturbed(model), **arguments)
