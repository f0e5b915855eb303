"""Decodes a block: runs its Transformer on a few positions at a time, with a key/value cache.

A step reads the token at each position and predicts the next token. Without a start token, the T
positions hold x_0..x_{T-1}, and the last prediction is unused. With a start token, they hold the
start token and x_0..x_{T-2}. Either way, position s predicts entry s + 1 of the result of `begin`.

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

# Every step reads the whole cache, whose size is fixed at compile time; on average half of it is
# masked. Growing the cache in two stages masks a quarter, in four stages an eighth. More stages
# take longer to compile.
PREFIXES, SHORTEST_PREFIX = 4, 24


class Decoder(NamedTuple):
    """Everything that a step of the inverse needs; see `step`."""

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
        """Builds the decoder of `batch` examples; a `cache_dtype` of None is the block's dtype."""
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
        """Zero-pads the caches to `length` positions; None stands for empty caches.

        Masked positions have probability 0, so they must be finite: 0 times NaN would be NaN.
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
        """Predicts the (guided) affine map of each position's next token.

        Args:
          x_DxBxS: the tokens at S positions.
          start: index of the first of the S positions; may be traced.
          caches: key/value caches of the positions before `start`. If they hold S positions only,
            `start` must be 0, and the step uses the attention kernel of training.
        Returns:
          the affine map, [D, B, S] float32 each, and the updated caches.
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
    """Prepares a block's parameters for decoding: unstacks layers and transposes kernels.

    Call it outside the decoding loop, or each iteration would copy every layer's weights.
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
    """Returns the sequence that decoding overwrites from entry 1 on; entry 0 is known.

    Returns:
      [T, D, B]; with a start token at the front [T + 1, D, B].
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
    """Implements `Block.inverse`, also for sequences of which a part is known.

    Args:
      known: bool [B, T, D], True where z_BxTxD holds numbers of x, which are kept; None for none.
        Tokens that are known completely come first in the block's order; at most one token that is
        known in part follows them.
      prefix: the number of tokens that are known completely in every example. One network call
        reads them all.
    Returns:
      x [B, T, D], and the inverse's log-determinant [B] in nats, of the unknown numbers.
    """
    B, T, _ = z_BxTxD.shape
    calls = block.calls
    # Position `first` makes the first prediction that is used.
    first = max(prefix - (block.first_token == 'identity'), 0)
    # XLA unrolls a loop of one step, and its CPU backend lacks this bfloat16 product outside a
    # loop. So the loop runs at least two steps; the extra result is dropped.
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
    """Splits 0..length - 1 into a few ranges (first, last); the caches grow from range to range."""
    count = max(1, min(PREFIXES, length // SHORTEST_PREFIX))
    size = max(1, -(-length // count))
    return [(first, min(first + size, length)) for first in range(0, length, size)]
