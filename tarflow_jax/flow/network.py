"""A block's Transformer over some positions and a key/value cache of those before them.

Shape suffixes: B images, N = B or 2 B rows (both branches of guided images), T patches, S positions
of one call, M = N * S, D numbers in a patch, C width, H heads, K head_dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array, at_least_float32, attention
from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.layers import gelu, normalize
from tarflow_jax.flow.model import Block, flip_if


class LayerCache(NamedTuple):
    """Keys and values of one layer at the positions seen so far, both [N, H, T, K]."""

    key: Array
    value: Array


class Network(NamedTuple):
    """What one step of an inverse calls: `predict`.

    It computes what `layers.Layer` does, with the channels first, [C, M], and the kernels turned
    round before the loop: a matrix product of few columns then has the kernel as its left operand,
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
    cache_dtype: Any

    @classmethod
    def of(cls, block: Block, params, labels, reverse, steering: Steering, batch: int, cache_dtype):
        """For `batch` images; `cache_dtype` is of keys and values, None for the block's."""
        params = block.layout.gather(params)
        labels, temperature = steering.branch(labels, batch)
        rows = batch * steering.branches
        # Bias and class are the same at every position.
        nothing = jnp.zeros((rows, 1, block.patch_dim)), jnp.zeros((1, block.width))
        constant: Any = block.apply({'params': params}, *nothing, labels, method='embed')

        def turned(linear, inputs: int):
            """The output axes first: [*outputs, *inputs], and the bias to add to [*outputs, M]."""
            kernel = linear['kernel'].astype(block.dtype)
            axes = (*range(inputs, kernel.ndim), *range(inputs))
            return kernel.transpose(axes), linear['bias'][..., None]

        # Unstacked here: inside a loop, each iteration would copy every layer's weights.
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
            cache_dtype=cache_dtype or block.dtype,
        )

    def grown(self, caches: list[LayerCache] | None, length: int) -> list[LayerCache]:
        """The caches (None: empty ones) with room for `length` positions, zeros where none are.

        Masked positions have probability 0, and 0 times what is not finite would be NaN.
        """
        block = self.block
        if caches is None:
            heads = block.width // block.head_dim
            empty = jnp.zeros((self.rows, heads, 0, block.head_dim), self.cache_dtype)
            caches = [LayerCache(empty, empty)] * block.num_layers
        more = ((0, 0), (0, 0), (0, length - caches[0].key.shape[2]), (0, 0))
        return [
            LayerCache(*(block.layout.place(jnp.pad(x, more), 'heads') for x in cache))
            for cache in caches
        ]

    def predict(self, x_DxBxS: Array, start, caches: list[LayerCache]):
        """Guided log-scale and shift of each position's successor.

        Args:
          x_DxBxS: what is at S positions, from `start` on, a traced number.
          caches: of the positions before them. With room for S only, these are all positions, and
            `start` is 0: then it is attention as in training, by the kernel of the chip.
        Returns:
          [D, B, S] float32 each, and the caches with these positions filled in.
        """
        block, S = self.block, x_DxBxS.shape[2]
        x_DxM = jnp.repeat(x_DxBxS, self.steering.branches, axis=1).reshape(block.patch_dim, -1)
        h = self._product(self.proj_in, x_DxM, 1)
        positions_CxS = jax.lax.dynamic_slice_in_dim(self.positions_TxC, start, S).T
        same = self.constant_CxN[:, :, None] + positions_CxS[:, None]
        h = h.astype(block.dtype) + same.reshape(h.shape).astype(block.dtype)
        h = block.layout.place(h, 'channels_first')
        filled = []
        for layer, cache in zip(self.layers, caches):
            h, cache = self._layer(layer, h, start, cache)
            filled.append(cache)
        kernel, bias = self.proj_out
        out = (self._product(kernel, h, 1) + bias).reshape(-1, self.rows, S)
        if block.volume_preserving:
            out = jnp.concatenate([jnp.zeros_like(out), out])
        log_scale, shift = jnp.split(out, 2)
        return *self.steering.guide(log_scale, shift, start), filled

    def _layer(self, layer: dict, h_CxM, start, cache: LayerCache):
        block, place = self.block, self.block.layout.place
        S = h_CxM.shape[1] // self.rows
        all_positions = S == cache.key.shape[2]

        def linear(name, x, inputs=1, at=...):
            kernel, bias = (a[at] for a in layer[name])
            return (self._product(kernel, x, inputs) + bias).astype(block.dtype)

        x = normalize(h_CxM, layer['attention_norm'], axis=0)
        def heads(x):  # [..., H, K, M] to [..., N, H, S, K]
            return jnp.einsum('...hkns->...nhsk', x.reshape(*x.shape[:-1], self.rows, S))

        # On TPU one product is faster where it is small, and else costs a copy to cut up.
        if all_positions:
            qkv = [heads(linear('qkv', x, at=i)) for i in range(3)]
        else:
            qkv = heads(linear('qkv', x))
        q, k, v = (place(part, 'heads') for part in qkv)
        scale = block.head_dim**-0.5 / self.temperature
        if all_positions:
            cache = LayerCache(k.astype(cache.key.dtype), v.astype(cache.value.dtype))
            x = block.layout.causal_attention(q, k, v, scale)
        else:
            at = (0, 0, start, 0)
            key = jax.lax.dynamic_update_slice(cache.key, k.astype(cache.key.dtype), at)
            value = jax.lax.dynamic_update_slice(cache.value, v.astype(cache.value.dtype), at)
            cache = LayerCache(place(key, 'heads'), place(value, 'heads'))
            mask = jnp.arange(key.shape[2]) <= start + jnp.arange(S)[:, None]
            x = attention(q, *cache, mask, scale)
        x = place(x, 'heads').transpose(1, 3, 0, 2).reshape(-1, block.head_dim, self.rows * S)
        h_CxM = place(h_CxM + linear('attention_proj', x, 2), 'channels_first')
        x = normalize(h_CxM, layer['mlp_norm'], axis=0)
        x = gelu(place(linear('mlp_in', x), 'hidden_first'))
        return place(h_CxM + linear('mlp_out', x), 'channels_first'), cache

    def _product(self, kernel, x, inputs: int) -> Array:
        """[*outputs, *inputs] times [*inputs, M], float32 at least."""
        last = range(kernel.ndim - inputs, kernel.ndim)
        return jax.lax.dot_general(
            kernel,
            x.astype(self.block.dtype),
            ((tuple(last), tuple(range(inputs))), ((), ())),
            # As in layers.Linear: float32 means float32.
            precision=None if self.block.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST,
            preferred_element_type=at_least_float32(self.block.dtype),
        )
