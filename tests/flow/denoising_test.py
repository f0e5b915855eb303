"""Denoising by the score, one step and many, against the official code and a Gaussian's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES, ITARFLOW_CASES, case, relative_error
from tiny_flow import batch, condition_for, noise_for, perturbed, sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.flow import denoising
from tarflow_jax.flow.condition import at_noise_level
from tarflow_jax.flow.condition import rows as rows_of
from tarflow_jax.training import sharding


@pytest.mark.parametrize('name', CASES)
def test_one_step_agrees_with_the_official_code(name):
    c = case(name)
    # The official code denoises volume-preserving flows under the unit prior.
    variables = jax.tree.map(np.array, c.variables)
    if 'prior' in variables:
        variables['prior']['variance'][:] = 1
    found = tfj.denoise(
        c.model, variables, c.images('x'), c.labels(), noise_std=float(c['denoise_sigma'])
    )
    assert relative_error(found, c.images('denoised')) < 1e-4


def tweedie(c, x, level, labels):
    """One step at a level, of `tfj.denoise`; levels share a program."""
    return tfj.denoise(
        c.model, c.variables, x, tfj.Condition(labels, np.float32(level)), noise_std=np.float32(level)
    )


@pytest.mark.parametrize('name', ITARFLOW_CASES)
class TestNoiseConditioned:
    def test_one_step_at_each_level(self, name):
        c, x = case(name), case(name).images('x')
        for level, wanted in zip(c['denoise_t'], c.images('denoised')):
            step = tweedie(c, x, level, c.labels()) - x
            # A difference of float32 numbers near 1 keeps few digits at the lowest level.
            assert abs(step - (wanted - x)).max() < 1e-4 * abs(wanted - x).max() + 5e-7

    def test_every_estimate_of_the_ode(self, name):
        c = case(name)
        for x, level, wanted in zip(c.images('ode_x'), c['ode_t'], c.images('ode_x0')):
            assert relative_error(tweedie(c, x, level, c.labels()), wanted) < 1e-4

    def test_ode(self, name):
        c = case(name)
        found = tfj.iterative_denoise(
            c.model, c.variables, c.images('sample_g_anneal'), c.labels(), levels=c['ode_t']
        )
        assert relative_error(found, c.images('ode')) < 1e-4

    def test_every_step_of_the_sde(self, name):
        c = case(name)
        levels = np.append(c['ode_t'], 0).astype(np.float32)
        noise = [*c.images('sde_noise'), None]
        x = jnp.asarray(c.images('sample_g_anneal'))
        for i, wanted in enumerate(c.images('sde_x')):
            assert relative_error(x, wanted) < 1e-4
            clean = tweedie(c, x, levels[i], c.labels())
            x = denoising.next_examples(x, clean, levels[i], levels[i + 1], noise[i])
        assert relative_error(x, c.images('sde')) < 1e-4


# Programs of their own, of some seconds: the long way down and the clipped one, for one case here.
@pytest.mark.parametrize('name', [
    ITARFLOW_CASES[0], pytest.param(ITARFLOW_CASES[1], marks=pytest.mark.slow),
])
@pytest.mark.parametrize('tag, levels, clip', [
    ('ode_clip', 'ode_t', True), ('ode_default', 'ode_default_t', False),
])
def test_ode_with_its_options(name, tag, levels, clip):
    c = case(name)
    found = tfj.iterative_denoise(
        c.model, c.variables, c.images('sample_g_anneal'), c.labels(), levels=c[levels], clip=clip
    )
    assert relative_error(found, c.images(tag)) < 1e-4


def test_denoising_strength_scales_the_step():
    model = sequence_flow(num_classes=3)
    variables, (x, labels) = perturbed(model), batch(model)
    step = lambda s: tfj.denoise(  # noqa: E731
        model, variables, x, labels, noise_std=0.1, strength=s) - x
    np.testing.assert_allclose(step(1.4), 1.4 * step(1.0), atol=1e-6)
    assert np.abs(step(1.0)).max() > 1e-3


def test_a_level_for_each_example():
    model = sequence_flow(num_classes=3)
    variables, (x, labels) = perturbed(model), batch(model)
    levels = jnp.array([0.1, 0.2, 0.3])
    found = tfj.denoise(model, variables, x, labels, noise_std=levels)
    for i, level in enumerate(levels):
        one = tfj.denoise(model, variables, x, labels, noise_std=jnp.full(3, level))
        np.testing.assert_allclose(found[i], one[i], rtol=1e-5, atol=1e-6)


MODEL = sequence_flow(num_classes=3, num_features=2, noise_conditioned=True)
LEVELS = np.array([0.5, 0.3, 0.1])


def by_hand(x, condition, key=None):
    """The recursion of the docstring, step by step."""
    variables = perturbed(MODEL)
    for i, (t, following) in enumerate(zip(LEVELS, [*LEVELS[1:], 0.0])):
        c = at_noise_level(condition, jnp.full(3, t, jnp.float32))
        clean = tfj.denoise(MODEL, variables, x, c, noise_std=jnp.full(3, t, jnp.float32))
        r = following / t
        if key is None:
            x = clean + r * (x - clean)
        else:
            keys = jax.random.split(key, len(x))  # one for each example
            n = jnp.stack([
                jax.random.normal(jax.random.fold_in(own, i), x.shape[1:]) for own in keys
            ])
            x = clean + following * (r * (x - clean) / t + np.sqrt(1 - r**2) * n)
    return x


@pytest.mark.parametrize('key', [None, jax.random.key(3)], ids=['ode', 'sde'])
def test_iterative_denoising_is_its_recursion(key):
    # The levels take the place of the condition's.
    condition = condition_for(MODEL)
    found = tfj.iterative_denoise(
        MODEL, perturbed(MODEL), noise_for(MODEL), condition, levels=LEVELS,
        solver='ode' if key is None else 'sde', key=key,
    )
    np.testing.assert_allclose(found, by_hand(noise_for(MODEL), condition, key), atol=1e-5)
    assert abs(found - noise_for(MODEL)).max() > 0.05


def test_an_example_with_a_key_of_its_own_does_not_depend_on_the_rest():
    keys, noise = jax.random.split(jax.random.key(5), len(noise_for(MODEL))), noise_for(MODEL)

    def denoised(rows):
        return tfj.iterative_denoise(
            MODEL, perturbed(MODEL), noise[rows], rows_of(condition_for(MODEL), rows),
            levels=LEVELS, solver='sde', key=keys[rows],
        )

    some = jnp.array([2, 0])
    np.testing.assert_allclose(denoised(some), denoised(jnp.arange(len(noise)))[some], atol=1e-5)


def test_one_level_is_one_step():
    condition = condition_for(MODEL)
    found = tfj.iterative_denoise(
        MODEL, perturbed(MODEL), noise_for(MODEL), condition, levels=[0.4]
    )
    level = np.float32(0.4)
    one = tfj.denoise(
        MODEL, perturbed(MODEL), noise_for(MODEL), at_noise_level(condition, level), noise_std=level
    )
    np.testing.assert_allclose(found, one, atol=1e-6)


def test_path_and_progress():
    calls = []
    given = dict(condition=condition_for(MODEL), levels=LEVELS, solver='sde', key=jax.random.key(3))
    path = tfj.iterative_denoise(
        MODEL, perturbed(MODEL), noise_for(MODEL), return_path=True,
        progress=lambda *steps: calls.append(steps), **given,
    )
    jax.effects_barrier()
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert path.shape == (4, *noise_for(MODEL).shape)
    np.testing.assert_array_equal(path[0], noise_for(MODEL))
    last = tfj.iterative_denoise(MODEL, perturbed(MODEL), noise_for(MODEL), **given)
    np.testing.assert_allclose(path[-1], last, atol=1e-6)
    # Entry i is at level i, so that the rest of the way goes on from it.
    rest = tfj.iterative_denoise(
        MODEL, perturbed(MODEL), path[2], condition_for(MODEL), levels=LEVELS[2:]
    )
    np.testing.assert_allclose(rest, path[3], atol=1e-5)


def test_progress_is_called_once_for_all_devices():
    mesh, calls = sharding.make_mesh(), []
    model = tiny((1,), noise_conditioned=True).clone(layout=sharding.Layout(mesh))
    images = sharding.split(np.asarray(batch(model, 8)[0]), mesh)
    tfj.iterative_denoise(
        model, perturbed(model), images, levels=[0.3, 0.1],
        progress=lambda *steps: calls.append(steps),
    )
    jax.effects_barrier()
    assert mesh.size == 8 and calls == [(1, 2), (2, 2)]


def test_progress_of_several_processes_is_refused(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(ValueError, match='progress supports one process, not 2'):
        tfj.iterative_denoise(
            MODEL, perturbed(MODEL), noise_for(MODEL), levels=LEVELS, progress=print
        )


def test_steps_of_the_solvers():
    x, clean, n = np.array([2.0, -1.0]), np.array([1.0, 0.5]), np.array([0.3, -0.7])
    found = denoising.next_examples(x, clean, 0.4, 0.1, None)
    np.testing.assert_allclose(found, clean + 0.25 * (x - clean), rtol=1e-6)
    found = denoising.next_examples(x, clean, 0.4, 0.1, n)
    wanted = clean + 0.1 * (0.25 * (x - clean) / 0.4 + np.sqrt(1 - 1 / 16) * n)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    np.testing.assert_allclose(denoising.next_examples(x, clean, 0.4, 0.0, n), clean)


def test_unconditional_flows_of_levels_need_no_condition():
    model = sequence_flow(noise_conditioned=True)
    found = tfj.iterative_denoise(model, perturbed(model), noise_for(model), levels=[0.3, 0.1])
    assert found.shape == (3, 4, 2) and np.isfinite(found).all()


@pytest.mark.parametrize('arguments, words', [
    ({'solver': 'heun'}, "solver 'heun' must be one of ode, sde"),
    ({'solver': 'sde'}, "solver 'sde' needs a key"),
    ({'key': jax.random.key(0)}, "'ode' takes none"),
    ({'levels': []}, 'must be a decreasing sequence of numbers above 0'),
    ({'levels': [0.1, 0.3]}, 'must be a decreasing sequence'),
    ({'levels': [0.3, 0.3]}, 'must be a decreasing sequence'),
    ({'levels': [0.3, 0.0]}, 'must be a decreasing sequence'),
    ({'levels': [[0.3]]}, 'must be a decreasing sequence'),
    ({'levels': [float('nan')]}, 'must be a decreasing sequence'),
    ({'images': np.zeros((3, 5, 2), np.float32)}, r'shape \(3, 5, 2\)'),
    ({'condition': np.array([0, 7, 1])}, 'label 7 is outside'),
])
def test_arguments_that_do_not_fit(arguments, words):
    given = {'images': noise_for(MODEL), 'levels': [0.3, 0.1], **arguments}
    with pytest.raises(ValueError, match=words):
        tfj.iterative_denoise(MODEL, perturbed(MODEL), **given)


def test_flows_of_one_level_are_sent_to_denoise():
    model = tiny((1,))
    with pytest.raises(ValueError, match='noise_conditioned=True; use denoise instead'):
        tfj.iterative_denoise(model, perturbed(model), batch(model)[0], levels=[0.1])
    with pytest.raises(ValueError, match='label 3 is outside 0..2'):
        tfj.denoise(model, perturbed(model), batch(model)[0], np.array([0, 3, 1]), noise_std=0.1)
