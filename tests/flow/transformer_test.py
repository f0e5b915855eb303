"""The pieces of a layer, values and derivatives, against the formulas they stand for, in float64;
and the layer with its channels first and last, with and without a cache."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tarflow_jax.flow import transformer
from tarflow_jax.flow.attention import attention
from tarflow_jax.flow.parameters import is_parameter
from tarflow_jax.flow.transformer import (
    ChannelsFirst,
    ChannelsLast,
    LayerCache,
    OneDevice,
    layer,
    layer_parameters,
)

LAST = ChannelsLast(jnp.float64, OneDevice())
FIRST = ChannelsFirst(jnp.float64, OneDevice())


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
        np.testing.assert_allclose(transformer.gelu(jnp.asarray(x)), expected, rtol=0, atol=1e-12)

    def test_float32_to_rounding(self):
        x = np.linspace(-8, 8, 100001).astype(np.float32)
        value = transformer.gelu(jnp.asarray(x))
        assert value.dtype == jnp.float32
        error = np.abs(value - transformer.gelu(jnp.asarray(x, jnp.float64)))
        assert (error <= 2e-7 * np.maximum(np.abs(x), 1)).all()

    def test_derivative_is_cdf_plus_x_times_density(self):
        x = jnp.linspace(-8, 8, 1001)
        cdf = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in np.asarray(x)])
        expected = cdf + x * jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        gradient = jax.vmap(jax.grad(transformer.gelu))(x)
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12)
        check_grads(transformer.gelu, (x[::50],), order=1, modes=('fwd',), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('axis', [0, 2])
def test_normalize(axis):
    x = jnp.moveaxis(normal(0, 2, 3, 8), 2, axis)
    scale, bias = normal(1, 8), normal(2, 8)

    def function(x, scale, bias):
        return transformer.normalize(x, {'scale': scale, 'bias': bias}, axis, x.dtype)

    def reference(x, scale, bias):
        x = jnp.moveaxis(x, axis, -1)
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
        return jnp.moveaxis((x - mean) / jnp.sqrt(variance + 1e-5) * scale + bias, -1, axis)

    check_value_and_gradient(function, reference, x, scale, bias)


@pytest.mark.parametrize('form', [LAST, FIRST], ids=['last', 'first'])
@pytest.mark.parametrize(
    'name, inputs, outputs',
    [('mlp_in', (6,), (4,)), ('qkv', (6,), (3, 2, 4)), ('attention_proj', (2, 3), (5,))],
)
def test_linear(form, name, inputs, outputs):
    x, kernel, bias = normal(0, 2, 3, *inputs), normal(1, *inputs, *outputs), normal(2, *outputs)

    def function(x, kernel, bias):
        params = {'kernel': kernel, 'bias': bias}
        if form is LAST:
            return form.linear(params, x, name)
        x = jnp.moveaxis(x, (0, 1), (-2, -1))
        return jnp.moveaxis(form.linear(form.prepare(params, name), x, name), (-2, -1), (0, 1))

    def reference(x, kernel, bias):
        return jnp.tensordot(x, kernel, len(inputs)) + bias

    check_value_and_gradient(function, reference, x, kernel, bias)


def parameters(width=8, head_dim=4, dtype=jnp.float64):
    leaves, tree = jax.tree.flatten(layer_parameters(width, head_dim), is_leaf=is_parameter)
    return jax.tree.unflatten(
        tree, [0.5 * normal(i, *p.shape, dtype=dtype) for i, p in enumerate(leaves)]
    )


def prepared(params, form=FIRST):
    return {k: form.prepare(own, k) if 'kernel' in own else own for k, own in params.items()}


def test_a_layer_is_its_formula():
    params, h, K = parameters(), normal(0, 2, 5, 8), 4

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * p['scale'] + p['bias']

    q, k, v = jnp.einsum(
        'ntc,cihk->inhtk', norm(h, params['attention_norm']), params['qkv']['kernel']
    ) + params['qkv']['bias'][:, None, :, None]
    mask = jnp.tril(jnp.ones((5, 5), bool))
    a = attention(q, k, v, mask, K**-0.5)
    proj = params['attention_proj']
    h_ = h + jnp.einsum('nhtk,hkc->ntc', a, proj['kernel']) + proj['bias']
    hidden = norm(h_, params['mlp_norm']) @ params['mlp_in']['kernel'] + params['mlp_in']['bias']
    wanted = h_ + transformer.gelu(hidden) @ params['mlp_out']['kernel'] + params['mlp_out']['bias']
    found, cache = layer(LAST, params, h, head_dim=K)
    assert cache is None
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize('temperature', [1.0, np.array([0.6, 1.7]).reshape(2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize('cut', [(5,), (2, 3)], ids=str)
def test_channels_first_and_a_cache_change_nothing(cut, temperature):
    params, h = parameters(), normal(0, 2, 5, 8)
    wanted, _ = layer(LAST, params, h, head_dim=4, temperature=temperature)
    empty = jnp.zeros((2, 2, 5, 4))
    cache, start, found = LayerCache(empty, empty), 0, []
    for length in cut:
        part = h[:, start : start + length].transpose(2, 0, 1)
        part, cache = layer(
            FIRST, prepared(params), part, head_dim=4, cache=cache, start=start,
            temperature=temperature,
        )
        found.append(part)
        start += length
    found = jnp.concatenate(found, 2).transpose(1, 2, 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12)
    assert (abs(cache.key).max((0, 1, 3)) > 0).all()


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
def test_types_in_are_types_out(dtype):
    h, params = normal(0, 2, 5, 8, dtype=dtype), parameters(dtype=jnp.float32)

    @jax.jit
    def both(h):
        last, _ = layer(ChannelsLast(dtype, OneDevice()), params, h, head_dim=4)
        form, empty = ChannelsFirst(dtype, OneDevice()), jnp.zeros((2, 2, 5, 4), jnp.bfloat16)
        first, cache = layer(
            form, prepared(params, form), h.transpose(2, 0, 1), head_dim=4,
            cache=LayerCache(empty, empty),
        )
        return last, first, cache

    last, first, cache = both(h)
    assert last.dtype == first.dtype == dtype
    assert cache.key.dtype == cache.value.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        last.astype(jnp.float32), first.transpose(1, 2, 0).astype(jnp.float32), atol=0.1
    )
