"""The sampler: the official samples, what it inverts, its programs, and what it draws again."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import (
    CASES,
    ITARFLOW_CASES,
    case,
    official_condition,
    official_guidance,
    relative_error,
)
from tiny_flow import apply, batch, noise_for, perturbed, sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.flow import decoder
from tarflow_jax.flow.affine import Affine
from tarflow_jax.flow.patches import patchify
from tarflow_jax.sampling import sample as sampling
from tarflow_jax.sampling.schedule import BlockSchedule

TAGS = ('g_ab', 'g_a', 'g_b', 'g_anneal', 'g_temp', 'g_temp_anneal')
ITARFLOW_TAGS = (
    'g_all', 'g_anneal', 'g_strong', 'g_two', 'g_first', 'g_first_flat', 'g_starflow',
    'g_starflow_anneal', 'g_temp', 'g_temp_anneal',
)


def test_every_recorded_sample_is_compared():
    for names, tags in ((CASES, TAGS), (ITARFLOW_CASES, ITARFLOW_TAGS)):
        for name in names:
            recorded = {key for key in case(name).arrays if key.startswith('kwargs_')}
            assert recorded == {f'kwargs_{tag}' for tag in tags}


@pytest.mark.parametrize('name', CASES + ITARFLOW_CASES)
def test_unguided_samples_and_every_step_of_them_agree_with_the_official_code(name):
    c = case(name)
    noise, condition = c.sequence('noise'), official_condition(c)
    found = tfj.sample(c.model, c.variables, noise, condition)
    assert relative_error(found, c.images('sample')) < 1e-4
    trajectory = tfj.sample_trajectory(c.model, c.variables, noise, condition)
    assert len(trajectory) == len(c.model.layers_per_block) + 1
    for i, x in enumerate(trajectory):
        assert relative_error(c.model.from_tokens(x), c.images(f'sequence_{i}')) < 1e-4


@pytest.mark.parametrize('name', ITARFLOW_CASES)
def test_samples_at_a_level_of_their_own_agree_with_the_official_code(name):
    c = case(name)
    found = tfj.sample(c.model, c.variables, c.sequence('noise'), c.condition())
    assert relative_error(found, c.images('sample_mixed_t')) < 1e-4


@pytest.mark.parametrize('name, tag', [
    *((name, tag) for name in CASES for tag in TAGS),
    *((name, tag) for name in ITARFLOW_CASES for tag in ITARFLOW_TAGS),
])
def test_guided_samples_agree_with_the_official_code(name, tag):
    c = case(name)
    guidance = official_guidance(c, tag)
    noise, condition = c.sequence('noise'), official_condition(c)
    if c.labels() is None and guidance.temperature == 1:
        # Both branches are the same network: the official code returns the unguided sample.
        with pytest.raises(ValueError, match='temperature'):
            tfj.sample(c.model, c.variables, noise, condition, guidance=guidance)
        guidance = None
    found = tfj.sample(c.model, c.variables, noise, condition, guidance=guidance)
    assert relative_error(found, c.images(f'sample_{tag}')) < 1e-4


@pytest.mark.parametrize('tag', [
    'g_strong', *(pytest.param(tag, marks=pytest.mark.slow) for tag in ('g_two', 'g_starflow_anneal')),
])
def test_parallel_methods_agree_with_the_official_code(tag):
    c = case(ITARFLOW_CASES[0])
    guidance, blocks = official_guidance(c, tag), len(c.model.layers_per_block)
    mixed = tfj.Schedule(tuple(BlockSchedule(b % 2, 1e-6) for b in range(blocks)))
    for given in (
        {'method': 'jacobi'}, {'method': 'gs_jacobi', 'segments': 4},
        {'method': 'auto', 'schedule': mixed},
    ):
        found = tfj.sample(
            c.model, c.variables, c.sequence('noise'), official_condition(c), guidance=guidance,
            tolerance=1e-6, **given,
        )
        assert relative_error(found, c.images(f'sample_{tag}')) < 1e-4


def test_it_inverts_the_flow():
    model = tiny(layers_per_block=(2, 1, 2))
    variables, (images, labels) = perturbed(model), batch(model)
    forward, _ = apply(model, variables, images, labels, method='trajectory')
    z = forward[-1]
    assert np.abs(tfj.sample(model, variables, z, labels) - images).max() < 1e-5
    trajectory = tfj.sample_trajectory(model, variables, z, labels)
    for found, wanted in zip(trajectory, [*forward[::-1], patchify(images, 2)], strict=True):
        assert np.abs(found - wanted).max() < 1e-5


@pytest.mark.parametrize('guidance', [None, tfj.Guidance(1.3, temperature=0.7, annealed=True)])
def test_the_cache_changes_nothing(guidance):
    # The inverse written without a cache: each position from a whole forward pass.
    model = sequence_flow(length=6, width=32, head_dim=16, num_classes=3)
    variables, (_, labels), noise = perturbed(model), batch(model), noise_for(model)
    predict = jax.jit(model.block(0).affine)
    x = noise
    for b in (1, 0):
        params = variables['params'][f'block_{b}']
        z = x[:, ::-1] if b else x
        x = z
        for t in range(1, 6):
            a, m, _ = predict(params, x, labels, np.bool_(b), 1.0)
            if guidance is not None:
                a_u, m_u, _ = predict(params, x, -jnp.ones(3, int), np.bool_(b), 0.7)
                w = 1.3 * t / 5
                a, m = a + w * (a - a_u), m + w * (m - m_u)
            x = x.at[:, t].set(Affine(a, m).inverse(z)[:, t])
        x = x[:, ::-1] if b else x
    found = tfj.sample(model, variables, noise, labels, guidance=guidance)
    assert np.abs(found - x).max() < 1e-5
    assert np.abs(found - noise).max() > 0.1


def test_volume_preserving_noise_is_scaled_by_the_prior():
    c = case('vp_cond')
    noise, labels = c.sequence('noise'), c.labels()
    wide = {**c.variables, 'prior': {'variance': 4 * c.variables['prior']['variance']}}
    np.testing.assert_allclose(
        tfj.sample(c.model, wide, noise, labels),
        tfj.sample(c.model, c.variables, 2 * noise, labels),
        atol=1e-5,
    )


def test_bfloat16_samples_are_close():
    model = tiny((1,))
    variables, noise = perturbed(model), noise_for(model)
    wanted = tfj.sample(model, variables, noise)
    found = tfj.sample(model.clone(dtype=jnp.bfloat16), variables, noise)
    assert found.dtype == jnp.float32
    assert 1e-5 < relative_error(found, wanted) < 0.05


def test_blocks_of_one_depth_share_one_program():
    # Of a width that no other test uses, so that nothing is compiled yet.
    model = sequence_flow(layers_per_block=(2, 2, 1, 2), width=12)
    before = decoder.invert._cache_size()
    tfj.sample(model, perturbed(model), noise_for(model))
    assert decoder.invert._cache_size() - before == 2


def test_weights_and_temperatures_share_one_program():
    model = sequence_flow(num_classes=3, width=20)
    variables, noise, labels = perturbed(model), noise_for(model), jnp.zeros(3, int)
    before = decoder.invert._cache_size()
    for guidance in (tfj.Guidance(1.0), tfj.Guidance(2.0, temperature=0.5, annealed=True)):
        tfj.sample(model, variables, noise, labels, guidance=guidance)
    assert decoder.invert._cache_size() - before == 1


def test_it_runs_inside_jit():
    model = sequence_flow(num_classes=3)
    variables, (_, labels), noise = perturbed(model), batch(model), noise_for(model)
    found = jax.jit(lambda v, z, y: tfj.sample(model, v, z, y))(variables, noise, labels)
    np.testing.assert_allclose(found, tfj.sample(model, variables, noise, labels), atol=1e-5)
    with pytest.raises(ValueError, match="'auto' inside jit needs schedule=calibrate"):
        jax.jit(lambda v, z: tfj.sample(model, v, z, method='auto'))(variables, noise)


class TestRedraws:
    """Samples that are not finite, made by noise that overflows."""

    model = sequence_flow(num_classes=3)

    def draw(self, bad, count=5, **kwargs):
        noise = noise_for(self.model, count).at[np.array(bad, int)].set(jnp.inf)
        return tfj.sample(
            self.model, perturbed(self.model), noise, jnp.arange(count) % 3, return_info=True,
            **kwargs,
        )

    def test_only_the_failed_ones_are_drawn_again(self):
        clean, _ = self.draw([])
        found, info = self.draw([1, 3, 4], key=jax.random.key(9))
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(info.redraws, [0, 1, 0, 1, 1])
        np.testing.assert_array_equal(found[np.array([0, 2])], clean[np.array([0, 2])])
        fresh = found[np.array([1, 3, 4])]
        assert np.abs(fresh - clean[np.array([1, 3, 4])]).max((1, 2)).min() > 0.1
        assert np.abs(fresh[0] - fresh[1]).max() > 0.1

    def test_they_are_what_their_noise_alone_gives(self):
        one, _ = self.draw([3], key=jax.random.key(9))
        many, _ = self.draw([1, 3, 4], key=jax.random.key(9))
        np.testing.assert_allclose(one[3], many[3], atol=1e-5)

    def test_without_a_key_they_stay(self):
        found, info = self.draw([2])
        assert not np.isfinite(found[2]).all()
        assert info.redraws.sum() == 0

    def test_it_gives_up(self):
        broken = jax.tree.map(lambda x: x * jnp.nan, perturbed(self.model))
        found, info = tfj.sample(
            self.model, broken, jnp.zeros((2, 4, 2)), key=jax.random.key(0), return_info=True
        )
        assert not np.isfinite(found).any()
        np.testing.assert_array_equal(info.redraws, [sampling.MAX_REDRAWS] * 2)


@pytest.mark.parametrize(
    'kwargs, words',
    [
        ({'noise': np.zeros((2, 15, 8))}, r'\(2, 15, 8\); this flow takes \[B, 16, 8\]'),
        ({'noise': np.zeros((16, 8))}, r'\(16, 8\); this flow takes'),
        ({'labels': np.array([0, 5])}, 'label 5 is outside 0..2'),
        ({'labels': np.array([0, 1, 2])}, r'labels have shape \(3,\)'),
        ({'method': 'psychic'}, "method 'psychic'.*sequential"),
        ({'schedule': tfj.Schedule(())}, "a schedule is for method 'auto', not 'sequential'"),
        ({'guidance': tfj.Guidance(1.0)}, 'labels, features or a temperature'),
    ],
)
def test_arguments_that_do_not_fit(kwargs, words):
    model = tiny((1,))
    arguments = {'noise': np.zeros((2, 16, 8)), **kwargs}
    with pytest.raises(ValueError, match=words):
        tfj.sample(model, perturbed(model), **arguments)


@functools.cache
def whole():
    model = tiny(layers_per_block=(1, 1))
    variables, (images, labels) = perturbed(model), batch(model)
    return model, variables, images, labels, apply(model, variables, images, labels)[0]


@pytest.mark.parametrize('method', ['jacobi', 'gs_jacobi'])
def test_parallel_decoding_inverts_the_flow(method):
    model, variables, images, labels, z = whole()
    found, info = tfj.sample(
        model, variables, z, labels, method=method, segments=4, tolerance=1e-6, return_info=True
    )
    assert np.abs(found - images).max() < 2e-5
    assert (np.asarray(info.residual) < 1e-5).all()
    assert (np.asarray(info.round_trip) < 1e-5).all()
    assert np.asarray(info.iterations).shape == (2, 3)
    assert not info.sequential.any()
