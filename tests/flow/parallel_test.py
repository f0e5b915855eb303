import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import Case
from tiny_flow import apply, batch, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.inverse import invert_block
from tarflow_jax.flow.parallel import solve_block, window_sizes

GUIDANCES = {
    'none': None,
    'linear': tfj.Guidance(1.3),
    'annealed': tfj.Guidance(1.3, annealed=True, temperature=0.7),
    'log_scale': tfj.Guidance(0.8, target='log_scale'),
    'starflow': tfj.Guidance(2.0, rule='starflow'),
}
ALWAYS = 100


def solve(model, z, labels=None, *, segments=1, guidance=None, tolerance=0.0, limit=ALWAYS, b=1):
    """Block b by parallel decoding, and sequentially."""
    params = perturbed(model)['params'][f'block_{b}']
    steering = Steering.of(guidance, model.num_patches)
    block, reverse = model.block_module(b), np.bool_(b % 2)
    found = solve_block(
        block, segments, params, z, labels, reverse, steering, jnp.float32(tolerance),
        jnp.int32(limit),
    )
    wanted, _ = invert_block(block, params, z, labels, reverse, steering)
    return found, wanted


def noise(count=4, key=3):
    return jax.random.normal(jax.random.key(key), (count, 16, 8))


LABELS = jnp.array([0, 2, -1, 1])


@pytest.mark.parametrize('segments', [1, 2, 3, 16])
def test_without_tolerance_it_is_sequential_decoding(segments):
    found, wanted = solve(tiny(), noise(), LABELS, segments=segments)
    assert np.abs(found.x - wanted).max() < 5e-6
    assert found.converged.all()
    assert found.calls <= 15
    np.testing.assert_array_equal(found.iterations.max(), found.calls)


@pytest.mark.parametrize('name', GUIDANCES)
def test_guidance_is_inside_the_iteration(name):
    found, wanted = solve(tiny(), noise(), LABELS, segments=2, guidance=GUIDANCES[name], b=0)
    assert np.abs(found.x - wanted).max() < 2e-5
    assert found.converged.all()


@pytest.mark.parametrize('tolerance', [1e-2, 1e-3, 1e-4])
def test_fewer_calls_and_an_error_near_the_tolerance(tolerance):
    found, wanted = solve(tiny(), noise(), LABELS, tolerance=tolerance)
    error = np.abs(found.x - wanted).max()
    assert error < 3 * tolerance
    assert found.calls < 15
    finer, _ = solve(tiny(), noise(), LABELS, tolerance=tolerance / 100)
    assert found.calls <= finer.calls
    assert np.abs(finer.x - wanted).max() < error


@pytest.mark.parametrize('segments', [1, 4])
def test_one_more_position_at_least_is_exact_after_every_iteration(segments):
    for limit in (1, 4, 9):
        found, wanted = solve(tiny(), noise(), LABELS, segments=segments, limit=limit)
        assert found.calls == limit
        # Block 1 runs from the last patch to the first.
        np.testing.assert_allclose(found.x[:, -limit - 1 :], wanted[:, -limit - 1 :], atol=2e-6)
        assert not found.converged.any()
    # Early on, the others are not.
    found, wanted = solve(tiny(), noise(), LABELS, segments=segments, limit=1)
    assert np.abs(found.x - wanted).max() > 1e-2


def test_an_image_does_not_depend_on_its_batch():
    model, z = tiny(), noise(4)
    together, _ = solve(model, z, LABELS, tolerance=1e-3)
    slow = int(together.iterations.argmax())
    assert together.iterations.min() < together.iterations[slow]
    for i in range(4):
        alone, _ = solve(model, z[i : i + 1], LABELS[i : i + 1], tolerance=1e-3)
        assert alone.iterations[0] == together.iterations[i] == alone.calls
        np.testing.assert_allclose(alone.x[0], together.x[i], atol=1e-5)


def test_a_block_whose_patches_do_not_meet_takes_two_calls():
    model = tiny()
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 2)))  # zero proj_out
    params = variables['params']['block_1']
    found = solve_block(
        model.block_module(1), 1, params, noise(), LABELS, np.bool_(True), Steering(),
        jnp.float32(1e-4), jnp.int32(ALWAYS),
    )
    assert found.calls == 2  # one that changes everything by the bias, one that changes nothing


def test_guesses_that_overflow_do_not_reach_other_positions():
    # Log-scales up to 3: plain iteration from z reaches infinity where the solution is tame.
    block, params = tiny().block_module(1), perturbed(tiny())['params']['block_1']
    kernel = 4 * params['proj_out']['kernel']
    params = {**params, 'proj_out': {**params['proj_out'], 'kernel': kernel}}
    predict = jax.jit(lambda x: block.apply({'params': params}, x, LABELS))
    wanted = noise()
    log_scale, shift = predict(wanted)
    z = guess = (wanted - shift) * jnp.exp(-log_scale)
    for _ in range(8):
        log_scale, shift = predict(guess)
        guess = z * jnp.exp(log_scale) + shift
    assert not np.isfinite(guess).all()
    arguments = (params, z, LABELS, np.bool_(False), Steering())
    found = solve_block(block, 1, *arguments, jnp.float32(0), jnp.int32(ALWAYS))
    assert np.abs(found.x - wanted).max() < 1e-3


def test_an_image_that_is_not_finite_ends_at_once_and_stays_alone():
    z = noise().at[2, 15].set(jnp.nan)  # the first position of block 1
    found, _ = solve(tiny(), z, LABELS, tolerance=1e-3)
    clean, _ = solve(tiny(), noise(), LABELS, tolerance=1e-3)
    assert found.iterations[2] == 1
    assert not np.isfinite(found.x[2]).all()
    rest = np.array([0, 1, 3])
    np.testing.assert_allclose(found.x[rest], clean.x[rest], atol=2e-6)
    assert found.converged.all()


def test_volume_preserving_blocks():
    case = Case('vp_cond')
    block, params = case.model.block_module(0), case.variables['params']['block_0']
    arguments = (params, case.sequence('noise'), case.labels(), np.bool_(False), Steering())
    wanted, _ = invert_block(block, *arguments)
    found = solve_block(block, 1, *arguments, jnp.float32(0), jnp.int32(ALWAYS))
    assert np.abs(found.x - wanted).max() < 1e-5


def test_windows():
    assert window_sizes(256, 1) == [256]
    assert window_sizes(256, 8) == [32, 16, 8]
    assert window_sizes(49, 3) == [17, 8]
    assert window_sizes(16, 16) == [1]


def test_bfloat16_cache():
    model, z = tiny(), noise()
    arguments = (perturbed(model)['params']['block_1'], z, LABELS, np.bool_(True), Steering())
    exact, _ = invert_block(model.block_module(1), *arguments)
    for found in (
        invert_block(model.block_module(1), *arguments, cache_dtype=jnp.bfloat16)[0],
        solve_block(
            model.block_module(1), 2, *arguments, jnp.float32(0), jnp.int32(ALWAYS),
            cache_dtype=jnp.bfloat16,
        ).x,
    ):
        assert 1e-5 < np.abs(found - exact).max() < 0.05


@functools.cache
def whole():
    model = tiny(layers_per_block=(2, 1, 2))
    variables, (images, labels) = perturbed(model), batch(model)
    return model, variables, images, labels, apply(model, variables, images, labels)[0]


@pytest.mark.parametrize('method', ['jacobi', 'gs_jacobi'])
def test_it_inverts_the_flow(method):
    model, variables, images, labels, z = whole()
    found, info = tfj.sample(
        model, variables, z, labels, method=method, segments=4, tolerance=1e-6, return_info=True
    )
    assert np.abs(found - images).max() < 2e-5
    assert (np.asarray(info.residual) < 1e-5).all()
    assert (np.asarray(info.round_trip) < 1e-5).all()
    assert np.asarray(info.iterations).shape == (3, 3)
    assert not info.sequential.any()
