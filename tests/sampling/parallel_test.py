import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import case
from tiny_flow import noise_for, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.sampling.parallel import solve_block, window_sizes

GUIDANCES = {
    'none': None,
    'linear': tfj.Guidance(1.3),
    'annealed': tfj.Guidance(1.3, annealed=True, temperature=0.7),
    'log_scale': tfj.Guidance(0.8, target='log_scale'),
    'linear_sigma': tfj.Guidance(1.3, rule='linear_sigma'),
    'starflow': tfj.Guidance(2.0, rule='starflow'),
}
ALWAYS = 100
MODEL = tiny((1, 1))
LABELS = jnp.array([0, 2, -1, 1])
UNGUIDED = GuidanceParams()


def noise(count=4):
    return noise_for(MODEL, count)


def sequential(model, z, labels=None, *, guidance=None, b=1):
    params = GuidanceParams.of(guidance, model.num_patches)
    own = perturbed(model)['params'][f'block_{b}']
    return model.block(b).inverse(own, z, labels, np.bool_(b % 2), params)


def parallel(
    block, params, z, labels, order, guidance=UNGUIDED, *, segments=1, tolerance=0.0, limit=ALWAYS,
    **more,
):
    """With the arguments of `Block.inverse`."""
    return solve_block(
        block, segments, z, params, labels, order, guidance, jnp.float32(tolerance),
        jnp.int32(limit), **more,
    )


def solve(model, z, labels=None, *, segments=1, guidance=None, tolerance=0.0, limit=ALWAYS, b=1):
    """Block b by parallel decoding, and sequentially."""
    params = GuidanceParams.of(guidance, model.num_patches)
    own = perturbed(model)['params'][f'block_{b}']
    found = parallel(
        model.block(b), own, z, labels, np.bool_(b % 2), params, segments=segments,
        tolerance=tolerance, limit=limit,
    )
    return found, sequential(model, z, labels, guidance=guidance, b=b)[0]


@pytest.mark.parametrize('segments', [1, 2, 3, 16])
def test_without_tolerance_it_is_sequential_decoding(segments):
    found, wanted = solve(MODEL, noise(), LABELS, segments=segments)
    assert np.abs(found.x - wanted).max() < 5e-6
    np.testing.assert_allclose(found.logdet, sequential(MODEL, noise(), LABELS)[1], atol=5e-5)
    assert found.converged.all()
    assert found.calls <= 15
    np.testing.assert_array_equal(found.iterations.max(), found.calls)


def test_smaller_windows_for_the_tail():
    model = tiny((1,), image_size=12)
    assert window_sizes(36, 2) == [18, 9]
    z = noise_for(model)
    found, wanted = solve(model, z, LABELS[:3], segments=2, tolerance=1e-6, b=0)
    assert np.abs(found.x - wanted).max() < 2e-5
    logdet = sequential(model, z, LABELS[:3], b=0)[1]
    np.testing.assert_allclose(found.logdet, logdet, atol=1e-4)
    assert found.converged.all() and found.calls < 35


@pytest.mark.parametrize('segments', [1, 4])
def test_with_a_start_token(segments):
    model = tiny((1, 1), first_token='start')
    found, wanted = solve(model, noise(), LABELS, segments=segments)
    assert np.abs(found.x - wanted).max() < 1e-5
    np.testing.assert_allclose(found.logdet, sequential(model, noise(), LABELS)[1], atol=1e-4)
    assert found.converged.all() and found.calls <= 16
    # Every iteration makes one more token final, the first included.
    for limit in (1, 5):
        part, _ = solve(model, noise(), LABELS, segments=segments, limit=limit)
        np.testing.assert_allclose(part.x[:, -limit:], wanted[:, -limit:], atol=5e-6)
        assert not part.converged.any()


@pytest.mark.parametrize('name', GUIDANCES)
def test_guidance_is_inside_the_iteration(name):
    found, wanted = solve(MODEL, noise(), LABELS, segments=2, guidance=GUIDANCES[name], b=0)
    assert np.abs(found.x - wanted).max() < 2e-5
    logdet = sequential(MODEL, noise(), LABELS, guidance=GUIDANCES[name], b=0)[1]
    np.testing.assert_allclose(found.logdet, logdet, atol=1e-4)
    assert found.converged.all()


@pytest.mark.parametrize('tolerance', [1e-2, 1e-3, 1e-4])
def test_fewer_calls_and_an_error_near_the_tolerance(tolerance):
    found, wanted = solve(MODEL, noise(), LABELS, tolerance=tolerance)
    error = np.abs(found.x - wanted).max()
    assert error < 3 * tolerance
    assert found.calls < 15
    finer, _ = solve(MODEL, noise(), LABELS, tolerance=tolerance / 100)
    assert found.calls <= finer.calls
    assert np.abs(finer.x - wanted).max() <= error


@pytest.mark.parametrize('segments', [1, 2])
def test_one_more_position_at_least_is_exact_after_every_iteration(segments):
    for limit in (1, 4, 9):
        found, wanted = solve(MODEL, noise(), LABELS, segments=segments, limit=limit)
        assert found.calls == limit
        # Block 1 runs from the last patch to the first.
        np.testing.assert_allclose(found.x[:, -limit - 1 :], wanted[:, -limit - 1 :], atol=2e-6)
        assert not found.converged.any()
    # Early on, the others are not.
    found, wanted = solve(MODEL, noise(), LABELS, segments=segments, limit=1)
    assert np.abs(found.x - wanted).max() > 1e-2


def test_an_image_does_not_depend_on_its_batch():
    z = noise(4) * jnp.array([0.1, 1.0, 1.5, 2.0])[:, None, None]
    together, _ = solve(MODEL, z, LABELS, tolerance=1e-3)
    slow = int(together.iterations.argmax())
    assert together.iterations.min() < together.iterations[slow]
    for i in range(4):
        alone, _ = solve(MODEL, z[i : i + 1], LABELS[i : i + 1], tolerance=1e-3)
        assert alone.iterations[0] == together.iterations[i] == alone.calls
        np.testing.assert_allclose(alone.x[0], together.x[i], atol=1e-5)


def test_a_block_whose_patches_do_not_meet_takes_two_calls():
    params = perturbed(MODEL)['params']['block_1']
    params = {**params, 'proj_out': {**params['proj_out'], 'kernel': 0 * params['proj_out']['kernel']}}
    found = parallel(MODEL.block(1), params, noise(), LABELS, np.bool_(True), tolerance=1e-4)
    assert found.calls == 2  # one that changes everything by the bias, one that changes nothing


def test_guesses_that_overflow_do_not_reach_other_positions():
    # Log-scales up to 3: plain iteration from z reaches infinity where the solution is tame.
    block, params = MODEL.block(1), perturbed(MODEL)['params']['block_1']
    kernel = 4 * params['proj_out']['kernel']
    params = {**params, 'proj_out': {**params['proj_out'], 'kernel': kernel}}
    predict = jax.jit(functools.partial(block.affine, params))
    wanted = noise()
    z = guess = predict(wanted, LABELS).forward(wanted)
    for _ in range(8):
        guess = predict(guess, LABELS).inverse(z)
    assert not np.isfinite(guess).all()
    found = parallel(block, params, z, LABELS, np.bool_(False))
    assert np.abs(found.x - wanted).max() < 1e-3


def test_an_image_that_is_not_finite_ends_at_once_and_stays_alone():
    z = noise().at[2, 15].set(jnp.nan)  # the first position of block 1
    found, _ = solve(MODEL, z, LABELS, tolerance=1e-3)
    clean, _ = solve(MODEL, noise(), LABELS, tolerance=1e-3)
    assert found.iterations[2] == 1
    assert not np.isfinite(found.x[2]).all()
    rest = np.array([0, 1, 3])
    np.testing.assert_allclose(found.x[rest], clean.x[rest], atol=2e-6)
    np.testing.assert_allclose(found.logdet[rest], clean.logdet[rest], atol=2e-5)
    assert found.converged.all()


def test_volume_preserving_blocks():
    c = case('vp_cond')
    block, params = c.model.block(0), c.variables['params']['block_0']
    arguments = (params, c.sequence('noise'), c.labels(), np.bool_(False))
    wanted, _ = block.inverse(*arguments)
    found = parallel(block, *arguments)
    assert np.abs(found.x - wanted).max() < 1e-5
    np.testing.assert_array_equal(found.logdet, 0)


def test_windows():
    assert window_sizes(256, 1) == [256]
    assert window_sizes(256, 8) == [32, 16, 8]
    assert window_sizes(49, 3) == [17, 8]
    assert window_sizes(16, 16) == [1]


def test_bfloat16_cache():
    arguments = (perturbed(MODEL)['params']['block_1'], noise(), LABELS, np.bool_(True))
    exact, _ = MODEL.block(1).inverse(*arguments)
    for found in (
        MODEL.block(1).inverse(*arguments, cache_dtype=jnp.bfloat16)[0],
        parallel(MODEL.block(1), *arguments, segments=2, cache_dtype=jnp.bfloat16).x,
    ):
        assert 1e-5 < np.abs(found - exact).max() < 0.05
