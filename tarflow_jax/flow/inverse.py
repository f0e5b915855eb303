"""The inverse of one block, one position after another.

Shape suffixes: B images, N = B or 2 B rows (both branches of guided images), T patches, D numbers
in a patch, C width, H heads, K head_dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array, at_least_float32, attention
from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.layers import LayerCache, empty_cache, gelu, normalize
from tarflow_jax.flow.model import Block, flip_if

# Every step reads the whole cache that it was compiled with, half of it in vain. Two programs, the
# first with half the cache, read a quarter in vain, four an eighth, and compile longer.
PREFIXES, SHORTEST_PREFIX = 4, 24


@partial(jax.jit, static_argnums=0, static_argnames='cache_dtype')
def invert_block(
    block: Block, params, z_BxTxD, labels, reverse, steering: Steering, *, cache_dtype=None
) -> tuple[Array, Array]:
    """The inverse of one block: x_t = z_t * exp(a_t) + m_t, t = 0..T-1 in the block's order.

    Args:
      z_BxTxD: in raster order, as is the result.
      cache_dtype: of keys and values; None is the block's.
    Returns:
      x [B, T, D], and the inverse's log-determinant [B] in nats, sum over t, d of a.
    """
    B, T, _ = z_BxTxD.shape
    z_TxDxB = flip_if(reverse, z_BxTxD, 1).transpose(1, 2, 0)
    network = _Network.of(block, params, labels, reverse, steering, B)
    dtype = cache_dtype or block.dtype
    heads = block.width // block.head_dim
    empty = empty_cache(network.rows, heads, 0, block.head_dim, dtype)

    def step(carry, inputs):
        x_DxB, caches, logdet_B = carry
        t, z_next_DxB = inputs
        log_scale, shift, caches = network.predict(x_DxB, t, caches)
        x_next_DxB = z_next_DxB * jnp.exp(log_scale) + shift
        return (x_next_DxB, caches, logdet_B + log_scale.sum(0)), x_next_DxB

    outputs = [z_TxDxB[:1]]
    carry = (z_TxDxB[0], [empty] * block.num_layers, jnp.zeros(B, z_TxDxB.dtype))
    for first, last in prefixes(T - 1):
        x, caches, logdet = carry
        caches = [_grown(cache, last, block.layout) for cache in caches]
        inputs = (jnp.arange(first, last), z_TxDxB[first + 1 : last + 1])
        carry, rest = jax.lax.scan(step, (x, caches, logdet), inputs)
        outputs.append(rest)
    x_BxTxD = jnp.concatenate(outputs).transpose(2, 0, 1)
    return flip_if(reverse, block.layout.place(x_BxTxD, 'tokens'), 1), carry[2]


def prefixes(length: int) -> list[tuple[int, int]]:
    """(first, last) of the few stretches of 0..length - 1 between which the caches grow."""
    count = max(1, min(PREFIXES, length // SHORTEST_PREFIX))
    size = max(1, -(-length // count))
    return [(first, min(first + size, length)) for first in range(0, length, size)]


def _grown(cache: LayerCache, length: int, layout) -> LayerCache:
    """The cache with room for `length` positions, zeros where there are none yet."""
    more = ((0, 0), (0, 0), (0, length - cache.key.shape[2]), (0, 0))
    return LayerCache(*(layout.place(jnp.pad(x, more), 'heads') for x in cache))


class _Network(NamedTuple):
    """A block's Transformer at one position, for all rows at once.

    It computes what `layers.Layer` does, with the channels first, [C, N], and the kernels turned
    round before the loop: a matrix product of few rows then has the kernel as its left operand,
    which XLA multiplies a third faster on a CPU, and may lay out as it likes on TPU and GPU.
    """

    block: Block
    steering: Steering
    rows: int
    positions_TxC: Array
    constant_CxN: Array
    temperature: Array | float
    proj_in: Array
    layers: list[dict]
    proj_out: dict

    @classmethod
    def of(cls, block: Block, params, labels, reverse, steering: Steering, batch: int):
        params = block.layout.gather(params)
        labels, temperature = steering.branch(labels, batch)
        rows = batch * steering.branches
        # Bias and class are the same at every position.
        nothing = jnp.zeros((rows, 1, block.patch_dim)), jnp.zeros((1, block.width))
        constant: Any = block.apply({'params': params}, *nothing, labels, method='embed')

        def turned(linear, inputs: int):
            """The output axes first: [*outputs, *inputs], and the bias to add to [*outputs, N]."""
            kernel = linear['kernel'].astype(block.dtype)
            axes = (*range(inputs, kernel.ndim), *range(inputs))
            return kernel.transpose(axes), linear['bias'][..., None]

        def layer(i):
            own = jax.tree.map(lambda x: x[i], params['layers'])
            inputs = {'qkv': 1, 'attention_proj': 2, 'mlp_in': 1, 'mlp_out': 1}
            return own | {name: turned(own[name], n) for name, n in inputs.items()}

        return cls(
            block=block,
            steering=steering,
            rows=rows,
            positions_TxC=flip_if(reverse, params['position_embedding'], 0),
            constant_CxN=constant[:, 0].T,
            temperature=temperature,
            proj_in=turned(params['proj_in'], 1)[0],
            layers=[layer(i) for i in range(block.num_layers)],
            proj_out=turned(params['proj_out'], 1),
        )

    def predict(self, x_DxB: Array, t, caches: list[LayerCache]):
        """Guided log-scale and shift of position t + 1, [D, B] float32 each; the caches with t."""
        block, place = self.block, self.block.layout.place
        h = self._product(self.proj_in, jnp.repeat(x_DxB, self.steering.branches, axis=1), 1)
        position_C = jax.lax.dynamic_index_in_dim(self.positions_TxC, t, keepdims=False)
        h = h.astype(block.dtype) + (self.constant_CxN + position_C[:, None]).astype(block.dtype)
        h = place(h, 'channels_first')
        filled = []
        for layer, cache in zip(self.layers, caches):
            h, cache = self._layer(layer, h, t, cache)
            filled.append(cache)
        kernel, bias = self.proj_out
        out = self._product(kernel, h, 1) + bias
        if block.volume_preserving:
            out = jnp.concatenate([jnp.zeros_like(out), out])
        log_scale, shift = jnp.split(out, 2)
        log_scale, shift = self.steering.guide(log_scale, shift, t, axis=1)
        return log_scale, shift, filled

    def _layer(self, layer: dict, h_CxN, t, cache: LayerCache):
        block, place = self.block, self.block.layout.place

        def linear(name, x, inputs=1):
            kernel, bias = layer[name]
            return (self._product(kernel, x, inputs) + bias).astype(block.dtype)

        x = normalize(h_CxN, layer['attention_norm'], axis=0)
        # [3, H, K, N] to the [N, H, 1, K] of the cache, each.
        q, k, v = (place(part.transpose(2, 0, 1)[:, :, None], 'heads') for part in linear('qkv', x))
        at = (0, 0, t, 0)
        key = jax.lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at)
        value = jax.lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at)
        cache = LayerCache(place(key, 'heads'), place(value, 'heads'))
        mask = jnp.arange(key.shape[2]) <= t
        x = attention(q, *cache, mask, block.head_dim**-0.5 / self.temperature)[:, :, 0]
        h_CxN = place(h_CxN + linear('attention_proj', x.transpose(1, 2, 0), 2), 'channels_first')
        x = normalize(h_CxN, layer['mlp_norm'], axis=0)
        x = gelu(place(linear('mlp_in', x), 'hidden_first'))
        return place(h_CxN + linear('mlp_out', x), 'channels_first'), cache

    def _product(self, kernel, x, inputs: int) -> Array:
        """[*outputs, *inputs] times [*inputs, N], float32 at least."""
        last = range(kernel.ndim - inputs, kernel.ndim)
        return jax.lax.dot_general(
            kernel,
            x.astype(self.block.dtype),
            ((tuple(last), tuple(range(inputs))), ((), ())),
            # As in layers.Linear: float32 means float32.
            precision=None if self.block.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
            preferred_element_type=at_least_float32(self.block.dtype),
        )
