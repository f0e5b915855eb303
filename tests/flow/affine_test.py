"""The affine map against its formulas, both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.flow.affine import SCALES, Affine, affine_of


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def outputs(seed=0, *shape, scale=2.0):
    return scale * jnp.asarray(np.random.default_rng(seed).standard_normal(shape or (2, 5, 6)))


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('limit', [None, 0.7])
@pytest.mark.parametrize('axis', [0, 2])
def test_scale_and_shift(scale, limit, axis):
    raw = outputs()
    found = affine_of(jnp.moveaxis(raw, 2, axis), axis, scale=scale, limit=limit)
    bounded = np.asarray(raw if limit is None else limit * np.tanh(raw / limit))
    a, m = bounded[..., :3], bounded[..., 3:]
    sigma = np.exp(a) if scale == 'exp' else np.log1p(np.exp(a + np.log(np.e - 1)))
    np.testing.assert_allclose(jnp.exp(found.log_scale), np.moveaxis(sigma, 2, axis), rtol=1e-12)
    np.testing.assert_allclose(found.shift, np.moveaxis(m, 2, axis), rtol=1e-12)
    assert found.sign is None


@pytest.mark.parametrize('scale', SCALES)
def test_zero_outputs_are_the_identity(scale):
    found = affine_of(jnp.zeros((1, 2, 4)), 2, scale=scale)
    np.testing.assert_allclose(found.log_scale, 0, atol=1e-15)
    np.testing.assert_array_equal(found.shift, 0)


def test_volume_preserving_is_a_shift_alone():
    raw = outputs()
    found = affine_of(raw, 2, volume_preserving=True, limit=0.5)
    assert found.shift.shape == raw.shape
    np.testing.assert_array_equal(found.log_scale, 0)
    np.testing.assert_allclose(found.shift, 0.5 * np.tanh(raw / 0.5), rtol=1e-12)


def test_limit_bounds_what_the_network_says():
    found = affine_of(outputs(scale=100.0), 2, limit=0.7)
    assert abs(found.log_scale).max() <= 0.7 and abs(found.shift).max() <= 0.7


def test_softplus_stays_finite_far_below_zero_and_keeps_its_digits():
    def log_scale(a, dtype):
        raw = jnp.stack([jnp.asarray(a, dtype), jnp.zeros((), dtype)])
        return affine_of(raw, 0, scale='softplus').log_scale[0]

    # softplus(x) is exp(x) (1 - exp(x) / 2 + ...), and exp(-800) is 0 in float64.
    shift = np.log(np.e - 1)
    assert float(log_scale(-800.0, jnp.float64)) == pytest.approx(-800 + shift, abs=1e-10)
    for a in (-200.0, -40.0, -16.0, -15.5, -3.0, 0.0, 5.0, 60.0):
        wanted = float(log_scale(a, jnp.float64))
        assert float(log_scale(a, jnp.float32)) == pytest.approx(wanted, rel=3e-7, abs=3e-7)
        slope = float(jax.grad(lambda a: log_scale(a, jnp.float32))(jnp.float32(a)))
        step = 1e-4
        rise = (log_scale(a + step, jnp.float64) - log_scale(a - step, jnp.float64)) / (2 * step)
        assert slope == pytest.approx(float(rise), rel=1e-4)


@pytest.mark.parametrize('sign', [None, 1, -1])
def test_forward_and_inverse(sign):
    log_scale, shift, x = (outputs(i, 2, 3) for i in range(3))
    signs = None if sign is None else jnp.where(jnp.arange(3) == 1, float(sign), 1.0)
    sigma = np.exp(log_scale) * np.asarray(1.0 if signs is None else signs)
    affine = Affine(log_scale, shift, signs)
    np.testing.assert_allclose(affine.forward(x), (x - shift) / sigma, rtol=1e-12)
    np.testing.assert_allclose(affine.inverse(x), x * sigma + shift, rtol=1e-12)
    np.testing.assert_allclose(affine.inverse(affine.forward(x)), x, rtol=1e-10)


def test_map_takes_what_is_there():
    affine = Affine(jnp.ones(2), jnp.zeros(2)).map(lambda x: x + 1)
    np.testing.assert_array_equal(affine.log_scale, 2)
    np.testing.assert_array_equal(affine.shift, 1)
    assert affine.sign is None
    assert Affine(jnp.ones(2), jnp.zeros(2), -jnp.ones(2)).map(lambda x: 2 * x).sign[0] == -2
