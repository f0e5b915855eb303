"""The Transformer layer of a TarFlow block, with its key/value cache as an argument and a return value.

Shape suffixes: B images, T positions of the whole sequence, S positions of this call, N = B*S
tokens, C width, H heads, K head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array


def at_least_float32(dtype) -> jnp.dtype:
    """float32 for narrower types; float64 stays (the tests differentiate in float64)."""
    return jnp.promote_types(dtype, jnp.float32)


class LayerCache(NamedTuple):
    """Keys and values of one layer at the positions seen so far, both [B, H, T, K]."""

    key: Array
    value: Array


def empty_cache(batch: int, heads: int, length: int, head_dim: int, dtype) -> LayerCache:
    # Zeros, not jnp.empty: masked positions are multiplied by probability 0, and 0 * NaN is NaN.
    zeros = jnp.zeros((batch, heads, length, head_dim), dtype)
    return LayerCache(zeros, zeros)


class Linear(nn.Module):
    """Affine map from the trailing axes `inputs` to `outputs`: y = x @ kernel + bias.

    Kernel [*inputs, *outputs], bias [*outputs]; both start uniform in +-1/sqrt(fan_in) (the
    recipe's initialisation), or the kernel at zero.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32
    zero_kernel: bool = False
    output_dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        bound = 1.0 / math.sqrt(math.prod(self.inputs))

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel_init = nn.initializers.zeros if self.zero_kernel else uniform
        kernel = self.param('kernel', kernel_init, self.inputs + self.outputs)
        bias = self.param('bias', uniform, self.outputs)

        n_in = len(self.inputs)
        leading = x.shape[: x.ndim - n_in]
        # One token axis: XLA's CPU backend has a slow path for the gradient of a matmul with two.
        x = x.reshape(-1, *self.inputs).astype(self.dtype)
        contract = (tuple(range(1, n_in + 1)), tuple(range(n_in)))
        # A float32 model means float32: TPUs (bfloat16) and GPUs (tf32) round the operands of a
        # default-precision matmul, which would cost the likelihood its digits.
        exact = self.dtype != jnp.bfloat16
        y = jax.lax.dot_general(
            x,
            kernel.astype(self.dtype),
            (contract, ((), ())),
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=at_least_float32(self.dtype),
        )
        y = (y + bias).astype(self.output_dtype or self.dtype)
        return y.reshape(*leading, *self.outputs)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, epsilon 1e-5, computed in float32."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, (self.width,))
        bias = self.param('bias', nn.initializers.zeros, (self.width,))
        wide = x.astype(at_least_float32(x.dtype))
        centred = wide - wide.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


def gelu(x: Array) -> Array:
    """x * Phi(x) with the exact normal distribution function."""
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


def attention(q_BxHxSxK: Array, k_BxHxTxK: Array, v_BxHxTxK: Array, mask: Array, scale) -> Array:
    """Softmax attention, logits and softmax in float32. Returns [B, H, S, K] in q's type.

    Args:
      mask: broadcastable to [B, H, S, T], True where a query may look.
      scale: multiplies the logits; a number, or an array broadcastable to [B, H, S, T].
    """
    wide = at_least_float32(q_BxHxSxK.dtype)
    precision = None if q_BxHxSxK.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    logits = jnp.einsum(
        'bhsk,bhtk->bhst', q_BxHxSxK, k_BxHxTxK, precision=precision, preferred_element_type=wide
    )
    logits = jnp.where(mask, logits * scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BxHxSxK.dtype)
    out = jnp.einsum(
        'bhst,bhtk->bhsk', weights, v_BxHxTxK, precision=precision, preferred_element_type=wide
    )
    return out.astype(q_BxHxSxK.dtype)


class Layer(nn.Module):
    """One pre-norm Transformer layer: h += proj(attention(norm(h))), h += mlp(norm(h))."""

    width: int
    head_dim: int = 64
    dtype: jnp.dtype = jnp.float32

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @nn.compact
    def __call__(
        self,
        h_BxSxC: Array,
        temperature=1.0,
        cache: LayerCache | None = None,
        start=0,
    ) -> tuple[Array, LayerCache | None]:
        """Without a cache: causal attention within the S = T given positions.

        With a cache: the S positions are those from `start` on; their keys and values are written
        into the cache, and each attends to every cached position up to itself.

        Args:
          temperature: divides the attention logits; a number or [B, 1, 1, 1].
        Returns:
          h [B, S, C] and the cache with these positions filled in (None if none was given).
        """
        B, S, C = h_BxSxC.shape
        H, K = self.heads, self.head_dim
        linear = lambda name, i, o: Linear(i, o, self.dtype, name=name)  # noqa: E731

        x = LayerNorm(C, name='attention_norm')(h_BxSxC)
        qkv = linear('qkv', (C,), (3, H, K))(x)
        q, k, v = (qkv[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        scale = K**-0.5 / temperature
        if cache is None:
            mask = jnp.tril(jnp.ones((S, S), bool))
        else:
            at = (0, 0, start, 0)
            k = jax.lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at)
            v = jax.lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at)
            cache = LayerCache(k, v)
            mask = jnp.arange(k.shape[2]) <= start + jnp.arange(S)[:, None]
        x = attention(q, k, v, mask, scale).transpose(0, 2, 1, 3)
        h_BxSxC = h_BxSxC + linear('attention_proj', (H, K), (C,))(x)

        x = LayerNorm(C, name='mlp_norm')(h_BxSxC)
        x = gelu(linear('mlp_in', (C,), (4 * C,))(x))
        return h_BxSxC + linear('mlp_out', (4 * C,), (C,))(x), cache
