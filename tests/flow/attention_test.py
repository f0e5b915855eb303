"""Attention: all kernels that run here against a plain softmax, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tarflow_jax.flow.attention import KERNELS, attention, causal_attention, kernel_for

# cuDNN needs a GPU, the compiled Pallas kernel a TPU; what runs there is interpreted here.
HERE = ['xla', 'whole_head_interpreted', 'splash_interpreted']
if jax.default_backend() == 'gpu':
    HERE.append('cudnn')
if jax.default_backend() == 'tpu':
    HERE += ['whole_head', 'splash']


def plain(q, k, v, scale):
    """The formula, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum('bhsk,bhtk->bhst', q, k) * np.asarray(scale, np.float64)
    logits = np.where(np.tri(q.shape[2], dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum('bhst,bhtk->bhsk', weights / weights.sum(-1, keepdims=True), v)


def inputs(dtype, length=256, heads=3, head_dim=64):
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, (2, heads, length, head_dim)).astype(dtype) for key in keys]


def value_and_gradient(kernel, scale, q, k, v, g):
    out, pull = jax.vjp(lambda *x: causal_attention(kernel, *x, scale), q, k, v)
    return (out, *pull(g))


@pytest.mark.parametrize('kernel', HERE)
@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 2e-6), (jnp.bfloat16, 1e-2)])
@pytest.mark.parametrize('scale', [0.125, np.array([0.125, 0.4]).reshape(2, 1, 1, 1)], ids=str)
def test_kernels_agree(kernel, dtype, tolerance, scale):
    if kernel == 'cudnn' and dtype == jnp.float32:
        pytest.skip('cuDNN attention is for 16 bits')
    q, k, v, g = inputs(dtype)
    run = jax.jit(value_and_gradient, static_argnums=0)
    found = run(kernel, scale, q, k, v, g)
    wanted = run('xla', scale, *(x.astype(jnp.float32) for x in (q, k, v, g)))
    np.testing.assert_allclose(wanted[0], plain(q, k, v, scale), atol=1e-5)
    for name, one, other in zip(('out', 'dq', 'dk', 'dv'), found, wanted):
        assert one.dtype == dtype
        error = np.abs(np.asarray(one, np.float32) - other).max() / np.abs(other).max()
        assert error < tolerance, (name, error)


@pytest.mark.parametrize('kernel', HERE)
def test_nothing_is_seen_of_what_comes_later(kernel):
    q, k, v, _ = inputs(jnp.float32, length=128, head_dim=16)
    out = jax.jit(causal_attention, static_argnums=0)
    before = out(kernel, q, k, v, 0.25)
    after = out(kernel, q.at[:, :, 70:].add(1), k.at[:, :, 70:].add(1), v.at[:, :, 70:].add(1), 0.25)
    np.testing.assert_array_equal(before[:, :, :70], after[:, :, :70])
    assert np.abs(before[:, :, 70:] - after[:, :, 70:]).min(-1).max() > 0.1


@pytest.mark.parametrize('length, heads, head_dim', [(384, 4, 64), (512, 2, 128), (128, 5, 32)])
def test_whole_heads_of_many_sizes(length, heads, head_dim):
    q, k, v, g = inputs(jnp.float32, length, heads, head_dim)
    run = jax.jit(value_and_gradient, static_argnums=(0, 1))
    kernels = ('whole_head_interpreted', 'xla')
    found, wanted = (run(kernel, 0.1, q, k, v, g) for kernel in kernels)
    for one, other in zip(found, wanted):
        assert jnp.abs(one - other).max() < 2e-6 * jnp.abs(other).max()


def test_the_kernel_of_whole_heads_takes_whole_tiles_only():
    q, k, v, _ = inputs(jnp.bfloat16, length=49)
    with pytest.raises(ValueError, match=r"multiple of 128 positions.*49 positions.*'xla'"):
        causal_attention('whole_head_interpreted', q, k, v, 0.125)


@pytest.mark.parametrize('platform, dtype, length, kernel', [
    ('tpu', jnp.bfloat16, 1024, 'whole_head'),
    ('tpu', jnp.bfloat16, 4096, 'splash'),
    ('tpu', jnp.bfloat16, 49, 'xla'),  # not a whole number of tiles
    ('tpu', jnp.float32, 1024, 'xla'),  # likelihoods keep their digits
    ('gpu', jnp.bfloat16, 49, 'cudnn'),
    ('gpu', jnp.float32, 1024, 'xla'),
    ('cpu', jnp.bfloat16, 1024, 'xla'),
])
def test_kernel_of_the_chip(platform, dtype, length, kernel):
    assert kernel_for(platform, dtype, length) == kernel
    assert kernel in KERNELS


@pytest.mark.parametrize('temperature', [1.0, 0.3])
def test_attention_over_a_mask_in_float64(temperature):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        q, k, v, cotangent = (jnp.asarray(rng.standard_normal((2, 3, 5, 4))) for _ in range(4))
        mask = jnp.tril(jnp.ones((5, 5), bool))
        scale = 0.5 / temperature

        def reference(q, k, v):
            rows = []
            for t in range(5):  # position t sees 0..t only
                e = jnp.exp(jnp.einsum('bhk,bhtk->bht', q[:, :, t], k[:, :, : t + 1]) * scale)
                rows.append(jnp.einsum('bht,bhtk->bhk', e / e.sum(-1, keepdims=True), v[:, :, : t + 1]))
            return jnp.stack(rows, 2)

        def function(*qkv):
            return attention(*qkv, mask, scale)

        found, wanted = (jax.vjp(f, q, k, v) for f in (function, reference))
        np.testing.assert_allclose(found[0], wanted[0], rtol=0, atol=1e-12)
        for one, other in zip(found[1](cotangent), wanted[1](cotangent)):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
        # Forward mode too: users take Jacobians of flows both ways.
        check_grads(function, (q, k, v), order=1, modes=('fwd',), atol=1e-5, rtol=1e-5)


def test_attention_survives_large_logits():
    q, k, v, _ = inputs(jnp.float32, length=5, heads=1, head_dim=4)
    mask = jnp.tril(jnp.ones((5, 5), bool))
    out, pull = jax.vjp(lambda *a: attention(*a, mask, 1e4), q, k, v)
    assert all(jnp.isfinite(x).all() for x in (out, *pull(v)))
