"""Standardization and bounds: unit moments, an exact inverse, and densities that integrate it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from tiny_flow import normal, perturbed, sequence_flow

import tarflow_jax as tfj

X = np.asarray(normal(0, 500, 4, 2)) * np.array([3.0, 0.2]) + np.arange(8).reshape(4, 2)


@pytest.mark.parametrize('axis, shape', [(0, (4, 2)), ((0, 1), (1, 2)), ((0, 1, 2), (1, 1))])
def test_moments_and_inverse(axis, shape):
    to = tfj.Standardize.fit(X, axis)
    y, logdet = to.forward(X)
    assert to.shift.shape == to.scale.shape == shape
    np.testing.assert_allclose(np.mean(y, axis), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(y, axis), 1, atol=1e-5)
    x, back = to.inverse(y)
    np.testing.assert_allclose(x, X, rtol=1e-5, atol=1e-5)
    assert logdet == -back
    scales = np.broadcast_to(X.std(axis, keepdims=True)[0], (4, 2))
    np.testing.assert_allclose(logdet, -np.log(scales).sum(), rtol=1e-5)


def test_density_of_what_was_standardized():
    # Twice the scale: the density of 8 dimensions is 2^8 times lower.
    flow = sequence_flow()
    y = normal(1, 3, 4, 2)
    to = tfj.Standardize(jnp.ones((1, 1)), jnp.full((1, 1), 2.0))
    same, logdet = to.forward(2 * y + 1)
    nats = tfj.log_prob(flow, perturbed(flow), same) + logdet
    expected = tfj.log_prob(flow, perturbed(flow), y) - 8 * np.log(2)
    np.testing.assert_allclose(nats, expected, rtol=1e-5)


def test_refuses_what_it_cannot_scale():
    with pytest.raises(ValueError, match='1 of 8 dimensions of the examples are constant'):
        tfj.Standardize.fit(X * (np.arange(8).reshape(4, 2) != 3))
    with pytest.raises(ValueError, match=r'axis \(1, 2\) must include 0'):
        tfj.Standardize.fit(X, (1, 2))


BOUNDS = np.array([-1.0, 2.0], np.float32), np.array([3.0, 2.5], np.float32)


def test_a_uniform_prior_becomes_a_standard_normal():
    to, levels = tfj.Probit(*BOUNDS), np.linspace(0.05, 0.95, 19, dtype=np.float32)[:, None]
    x = BOUNDS[0] + (BOUNDS[1] - BOUNDS[0]) * levels
    y, logdet = to.forward(x)
    np.testing.assert_allclose(y, np.broadcast_to(norm.ppf(levels), y.shape), atol=1e-5)
    # The density of x is that of the prior, 1 / (4 * 0.5).
    np.testing.assert_allclose(norm.logpdf(y).sum(1) + logdet, -np.log(2.0), atol=1e-4)
    back, inverse_logdet = to.inverse(y)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(inverse_logdet, -logdet)


def test_stays_within_the_bounds():
    to = tfj.Probit(*BOUNDS)
    y = jnp.array([[-40.0, 40.0], [jnp.inf, -jnp.inf]])
    x, _ = to.inverse(y)
    assert ((x >= BOUNDS[0]) & (x <= BOUNDS[1])).all()
    again, logdet = to.forward(x)  # on the bounds
    assert np.isfinite(again).all() and np.isfinite(logdet).all() and abs(again).max() > 5
    assert jax.tree.map(jnp.shape, jax.jit(lambda to: to)(to)) == tfj.Probit((2,), (2,))


@pytest.mark.parametrize('low, high', [(1.0, 1.0), (BOUNDS[1], BOUNDS[0]), (0.0, np.inf)])
def test_refuses_bounds_in_the_wrong_order(low, high):
    with pytest.raises(ValueError, match='must be below high'):
        tfj.Probit(low, high)


@pytest.mark.parametrize('to', [tfj.Probit(*BOUNDS), tfj.Standardize(BOUNDS[0], BOUNDS[1])])
def test_refuses_examples_that_would_be_broadcast(to):
    # Tokens of one number, where the bounds are those of two parameters.
    for method in (to.forward, to.inverse):
        with pytest.raises(ValueError, match=r'shape \(5, 2, 1\), and what maps them has shape \(2,\)'):
            method(np.zeros((5, 2, 1), np.float32))
