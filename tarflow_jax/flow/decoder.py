"""Decoding a block: its Transformer over a few positions and a key/value cache of those before.

A step reads tokens at positions 0..T-1 and predicts the next. Without a start token the tokens are
x_0..x_{T-1}, and what the last position predicts is unused; with one they are the start token,
x_0..x_{T-2}. Either way position s predicts the entry s + 1 of the `sequence` that `begin` makes.

Shape suffixes: B examples, N = B or 2 B rows (both branches of guided examples), T tokens, S
positions of a call, D numbers in a token, C width.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow.affine import Affine
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.flow.order import reorder, restore
from tarflow_jax.flow.parameters import is_parameter
from tarflow_jax.flow.transformer import ChannelsFirst, LayerCache

if TYPE_CHECKING:
    from tarflow_jax.flow.block import Block

# Every step reads the whole cache that it was compiled with, and on average half of it is masked.
# With two programs, the first with half the cache, a quarter is masked, with four an eighth; and
# they compile longer.
PREFIXES, SHORTEST_PREFIX = 4, 24


class Decoder(NamedTuple):
    """What one step of an inverse calls: `step`."""

    block: Block
    form: ChannelsFirst
    params: dict
    positions: Array  # [T, C, 1]
    context: Array  # [1 or T, C, N or 1]
    guidance: GuidanceParams
    temperature: Any
    rows: int
    cache_dtype: Any

    @classmethod
    def of(
        cls, block: Block, params, condition, order, guidance: GuidanceParams, batch: int,
        cache_dtype=None,
    ) -> Decoder:
        """For `batch` examples; `cache_dtype` is that of keys and values, None for the block's."""
        form = ChannelsFirst(block.dtype, block.layout, block.precision)
        params = jax.tree.map(
            lambda p, x: block.layout.gather(x, p.axes), block.parameters(), params,
            is_leaf=is_parameter,
        )
        condition, temperature = guidance.branch(condition, batch)
        positions = reorder(params['position_embedding'], order, axis=0).astype(block.stream_dtype)
        context = block.context(params, condition, order).transpose(1, 2, 0)
        return cls(
            block, form, prepare(block, form, params), positions[..., None], context, guidance,
            temperature, batch * guidance.branches, cache_dtype or block.dtype,
        )

    def pad_caches(self, caches: list[LayerCache] | None, length: int) -> list[LayerCache]:
        """Zero-pads the caches (None: empty ones) to `length` positions.

        Masked positions have probability 0, and 0 times what is not finite would be NaN.
        """
        block = self.block
        if caches is None:
            heads = block.width // block.head_dim
            empty = jnp.zeros((self.rows, heads, 0, block.head_dim), self.cache_dtype)
            caches = [LayerCache(empty, empty)] * block.num_layers
        more = ((0, 0), (0, 0), (0, length - caches[0].key.shape[2]), (0, 0))
        return [
            LayerCache(*(
                block.layout.constrain(jnp.pad(x, more), 'batch', 'heads', 'length', 'head_dim')
                for x in cache
            ))
            for cache in caches
        ]

    def step(
        self, x_DxBxS: Array, start, caches: list[LayerCache]
    ) -> tuple[Affine, list[LayerCache]]:
        """The (guided) map of each position's next token.

        Args:
          x_DxBxS: the tokens at S positions, from `start` on, a number that may be traced.
          caches: of the positions before them. With room for S only, these are all positions, and
            `start` is 0: then it is attention as in training, by the kernel of the chip.
        Returns:
          [D, B, S] float32 each, and the caches with these positions filled in.
        """
        S = x_DxBxS.shape[2]
        x_DxNxS = jnp.repeat(x_DxBxS, self.guidance.branches, axis=1)

        def here(a):
            return a if a.shape[0] == 1 else jax.lax.dynamic_slice_in_dim(a, start, S)

        context = jnp.moveaxis(here(self.positions) + here(self.context), 0, 2)
        affine, caches = self.block.network(
            self.form, self.params, x_DxNxS, context, caches=caches, start=start,
            temperature=self.temperature,
        )
        first = start + (self.block.first_token == 'identity')
        return self.guidance.combine(affine, first), caches


def prepare(block: Block, form: ChannelsFirst, params) -> dict:
    """A block's parameters for decoding: layers unstacked, kernels transposed.

    Inside a loop, each iteration would copy every layer's weights.
    """
    def one(tree):
        return {
            name: form.prepare(own, name) if 'kernel' in own else own for name, own in tree.items()
        }

    layers = [
        one(jax.tree.map(lambda x, i=i: x[i], params['layers'])) for i in range(block.num_layers)
    ]
    ends = {name: params[name] for name in ('proj_in', 'proj_out')}
    return one(ends) | {'layers': layers}


def begin(block: Block, params, z_TxDxB: Array) -> Array:
    """The entries that decoding replaces one by one, but for the first, which is known.

    Returns:
      [T, D, B], or [T + 1, D, B] with a start token in front.
    """
    if block.first_token == 'identity':
        return z_TxDxB
    start = jnp.broadcast_to(
        params['start'].astype(z_TxDxB.dtype)[None, :, None], z_TxDxB[:1].shape
    )
    return jnp.concatenate([start, z_TxDxB])


@partial(jax.jit, static_argnums=0, static_argnames=('prefix', 'cache_dtype'))
def invert(
    block: Block, z_BxTxD: Array, params, condition, order, guidance: GuidanceParams, *,
    known: Array | None = None, prefix: int = 0, cache_dtype=None,
) -> tuple[Array, Array]:
    """`Block.inverse`, also of sequences that are known in part.

    Args:
      known: bool [B, T, D], True where z_BxTxD holds numbers of x, which stay as they are; None is
        nowhere. Tokens that are known throughout come first in the block's order, and at most one
        that is known in part follows them.
      prefix: the number of tokens that are known throughout in every example. One network call
        reads them all.
    Returns:
      x [B, T, D], and the inverse's log-determinant [B] in nats, of the unknown numbers.
    """
    B, T, _ = z_BxTxD.shape
    calls = block.calls
    # Position `first` makes the first prediction that is looked at.
    first = max(prefix - (block.first_token == 'identity'), 0)
    # XLA removes a loop of one step, and its CPU backend has no bfloat16 products outside of loops
    # in this form: one step more, whose result is unused.
    steps = max(calls, first + 2)
    entries = begin(block, params, reorder(z_BxTxD, order).transpose(1, 2, 0))
    more = ((0, steps - calls), (0, 0), (0, 0))
    if known is not None:
        known = reorder(known, order).transpose(1, 2, 0)
        start_token = ((len(entries) - T, 0), (0, 0), (0, 0))
        known = jnp.pad(jnp.pad(known, start_token, constant_values=True), more)
    entries = jnp.pad(entries, more)
    decoder = Decoder.of(block, params, condition, order, guidance, B, cache_dtype)

    def step(carry, inputs):
        x_DxB, caches = carry
        position, z_next_DxB, known_next = inputs
        affine, caches = decoder.step(x_DxB[..., None], position, caches)
        affine = affine.map(lambda a: a[..., 0])
        x_next_DxB, log_scale = affine.inverse(z_next_DxB), affine.log_scale
        if known_next is not None:
            x_next_DxB = jnp.where(known_next, z_next_DxB, x_next_DxB)
            log_scale = jnp.where(known_next, 0.0, log_scale)
        return (x_next_DxB, caches), (x_next_DxB, log_scale.sum(0))

    outputs, log_scales = [entries[: first + 1]], []
    caches = None
    if first:
        x_DxBxS = entries[:first].transpose(1, 2, 0)
        _, caches = decoder.step(x_DxBxS, 0, decoder.pad_caches(None, first))
    carry: Any = (entries[first], caches)
    for begins, ends in prefixes(steps - first):
        here = slice(first + begins + 1, first + ends + 1)
        inputs = (
            jnp.arange(first + begins, first + ends), entries[here],
            None if known is None else known[here],
        )
        carry = (carry[0], decoder.pad_caches(carry[1], first + ends))
        carry, (rest, log_scale) = jax.lax.scan(step, carry, inputs)
        outputs.append(rest)
        log_scales.append(log_scale)
    x_TxDxB = jnp.concatenate(outputs)[: calls + 1][-T:]
    x_BxTxD = block.layout.constrain(x_TxDxB.transpose(2, 0, 1), 'batch', 'length', 'token')
    return restore(x_BxTxD, order), jnp.concatenate(log_scales)[: calls - first].sum(0)


def prefixes(length: int) -> list[tuple[int, int]]:
    """(first, last) of the few stretches of 0..length - 1 between which the caches grow."""
    count = max(1, min(PREFIXES, length // SHORTEST_PREFIX))
    size = max(1, -(-length // count))
    return [(first, min(first + size, length)) for first in range(0, length, size)]
