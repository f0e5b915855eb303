"""The pieces of a layer, values and derivatives, against the formulas they stand for, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tarflow_jax.flow import layers
from tarflow_jax.flow.attention import attention


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def check_value_and_gradient(function, reference, *arguments):
    """Value and gradient to 1e-12 of the reference's; forward mode against finite differences."""
    cotangent = normal(9, *reference(*arguments).shape)
    value, pull = jax.vjp(function, *arguments)
    expected, expected_pull = jax.vjp(reference, *arguments)
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
    for got, want in zip(pull(cotangent), expected_pull(cotangent)):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    # Forward mode too: users take Jacobians of flows both ways.
    check_grads(function, arguments, order=1, modes=('fwd',), atol=1e-5, rtol=1e-5)


class TestGelu:
    def test_against_the_normal_distribution_function(self):
        x = np.linspace(-8, 8, 1001)
        expected = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x]
        np.testing.assert_allclose(layers.gelu(jnp.asarray(x)), expected, rtol=0, atol=1e-12)

    def test_float32_to_rounding(self):
        x = np.linspace(-8, 8, 100001).astype(np.float32)
        value = layers.gelu(jnp.asarray(x))
        assert value.dtype == jnp.float32
        error = np.abs(value - layers.gelu(jnp.asarray(x, jnp.float64)))
        assert (error <= 2e-7 * np.maximum(np.abs(x), 1)).all()

    def test_derivative_is_cdf_plus_x_times_density(self):
        x = jnp.linspace(-8, 8, 1001)
        cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(x)])
        expected = cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        gradient = jax.vmap(jax.grad(layers.gelu))(x)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)
        check_grads(layers.gelu, (x[::50],), order=1, modes=('fwd',), atol=1e-5, rtol=1e-5)


def test_layer_norm():
    x, scale, bias = normal(0, 2, 3, 8), normal(1, 8), normal(2, 8)

    def function(x, scale, bias):
        return layers.LayerNorm(8).apply({'params': {'scale': scale, 'bias': bias}}, x)

    def reference(x, scale, bias):
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias

    check_value_and_gradient(function, reference, x, scale, bias)


@pytest.mark.parametrize(
    'inputs, outputs', [((6,), (4,)), ((6,), (3, 2, 4)), ((2, 3), (5,))], ids=['plain', 'qkv', 'proj']
)
def test_linear(inputs, outputs):
    x, kernel, bias = normal(0, 2, 3, *inputs), normal(1, *inputs, *outputs), normal(2, *outputs)
    module = layers.Linear(inputs, outputs, dtype=jnp.float64)

    def function(x, kernel, bias):
        return module.apply({'params': {'kernel': kernel, 'bias': bias}}, x)

    def reference(x, kernel, bias):
        return jnp.tensordot(x, kernel, len(inputs)) + bias

    check_value_and_gradient(function, reference, x, kernel, bias)


@pytest.mark.parametrize('temperature', [1.0, 0.3])
def test_causal_attention(temperature):
    q, k, v = (normal(i, 2, 3, 5, 4) for i in range(3))
    mask = jnp.tril(jnp.ones((5, 5), bool))
    scale = 0.5 / temperature

    def reference(q, k, v):
        rows = []
        for t in range(5):  # position t sees 0..t only
            e = jnp.exp(jnp.einsum('bhk,bhtk->bht', q[:, :, t], k[:, :, : t + 1]) * scale)
            rows.append(jnp.einsum('bht,bhtk->bhk', e / e.sum(-1, keepdims=True), v[:, :, : t + 1]))
        return jnp.stack(rows, 2)

    check_value_and_gradient(lambda *a: attention(*a, mask, scale), reference, q, k, v)


def test_attention_survives_large_logits():
    q, k, v = (normal(i, 1, 1, 5, 4, dtype=jnp.float32) for i in range(3))
    mask = jnp.tril(jnp.ones((5, 5), bool))
    pull = jax.vjp(lambda *a: attention(*a, mask, 1e4), q, k, v)
    assert all(jnp.isfinite(x).all() for x in (pull[0], *pull[1](v)))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_types_in_are_types_out(dtype):
    layer = layers.Layer(width=8, head_dim=4, dtype=dtype)
    h = normal(0, 2, 5, 8, dtype=dtype)
    out, _ = layer.apply(layer.init(jax.random.key(0), h), h)
    assert out.dtype == dtype
