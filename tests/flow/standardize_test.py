"""Standardization: unit moments, an exact inverse, and densities that integrate it."""

import jax.numpy as jnp
import numpy as np
import pytest
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
    with pytest.raises(ValueError, match=r'axis \(1, 2\) must hold 0'):
        tfj.Standardize.fit(X, (1, 2))
