"""Parallel decoding: the inverse of a block as a fixed point over a window of positions.

The inverse solves x = z * exp(a(x)) + m(x), where a and m at a position depend on earlier positions
only. One iteration evaluates the right-hand side at all positions of a window at once. This makes
the first position that is not final exact. In a trained flow, many positions after it come close.
The next iteration reads the final positions from a key/value cache, and its window starts at the
first position that is not final.

- Jacobi iteration has one window, as long as the sequence.
- Gauss-Seidel-Jacobi iteration (arXiv 2505.12849) has a window of a `segments`-th of the sequence.
  In the paper, a segment waits until the one before it is complete. Here the window moves on as
  soon as its first positions are final. That never takes more iterations, and usually fewer.

Shape suffixes: B examples, T tokens, D numbers in a token, W positions of a window.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.block import Block
from tarflow_jax.flow.decoder import Decoder, begin
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.flow.order import reorder, restore
from tarflow_jax.flow.transformer import LayerCache

# Guesses may overflow where the solution does not, and attention would carry one infinite key to
# all positions of its example. No useful solution is larger than this.
LARGEST_GUESS = 1e4


class _State(NamedTuple):
    """The state of the loop. Entries are those of `decoder.begin`, padded to T + 1.

    Args:
      x_DxBxE: E = T + 1 entries; the first `final` of them are final, the others are guesses.
      log_scale_BxE: of each entry, summed over d.
      final: [B], the number of final entries.
      iterations: [B], the iterations that each example took.
      calls: the network calls that the batch took.
    """

    x_DxBxE: Array
    log_scale_BxE: Array
    final: Array
    caches: list[LayerCache]
    iterations: Array
    calls: Array  # `count` is a method of tuples


class Solution(NamedTuple):
    """The inverse of a block.

    Args:
      x: [B, T, D].
      logdet: [B], of the inverse, in nats.
      iterations: int32 [B], that each example took.
      converged: bool [B].
      calls: of the network, for the whole batch.
    """

    x: Array
    logdet: Array
    iterations: Array | np.ndarray
    converged: Array | np.ndarray
    calls: Array | np.integer


def window_sizes(num_patches: int, segments: int) -> list[int]:
    """Returns the size of the window, then smaller sizes for the tail of the sequence.

    A window of the whole sequence has no smaller ones: its attention kernel is so fast that they
    would not save time.
    """
    if segments == 1:
        return [num_patches]
    window = -(-num_patches // segments)
    return [window >> i for i in range(3) if i == 0 or window >> i >= 8]


@partial(jax.jit, static_argnums=(0, 1), static_argnames='cache_dtype')
def solve_block(
    block: Block,
    segments: int,
    z_BxTxD,
    params,
    condition,
    order,
    guidance: GuidanceParams,
    tolerance,
    max_iterations,
    *,
    cache_dtype=None,
) -> Solution:
    """Computes the inverse of one block, as `Block.inverse` does, by iteration over windows.

    An entry becomes final when it is exact, or when no earlier entry changed by more than the
    tolerance in the iteration that made it. Final entries never change again, so an example's
    result does not depend on the rest of its batch.

    Args:
      segments: the window holds a `segments`-th of the positions; 1 is the whole sequence.
      tolerance: in units of x.
      max_iterations: stops here even if examples have not converged; `Block.calls` always suffice.
    """
    B, T, _ = z_BxTxD.shape
    z = begin(block, params, reorder(z_BxTxD, order).transpose(1, 2, 0)).transpose(1, 2, 0)
    entries = z.shape[2]
    z = jnp.pad(z, ((0, 0), (0, 0), (0, T + 1 - entries)))
    decoder = Decoder.of(block, params, condition, order, guidance, B, cache_dtype)
    sizes = window_sizes(T, segments)

    def iterate(W: int, state: _State) -> _State:
        x, log_scale, final, caches, iterations, calls = state
        # The prediction from the last final entry has not been made yet.
        start = jnp.clip(final.min() - 1, 0, T - W)

        def window(a, first):
            return jax.lax.dynamic_slice_in_dim(a, first, W, a.ndim - 1)

        affine, caches = decoder.step(window(x, start), start, caches)
        old, new = window(x, start + 1), affine.inverse(window(z, start + 1))
        position = start + 1 + jnp.arange(W)

        known = position < final[:, None]
        same = known | (abs(new - old).max(0) <= tolerance)
        first_changed = start + 1 + jnp.cumprod(same, 1).sum(1)
        # The first entry that changed is final too, because all entries before it are.
        reached = jnp.minimum(jnp.maximum(first_changed, final) + 1, start + 1 + W)
        reached = jnp.clip(reached, final, entries)
        guess = jnp.clip(jnp.nan_to_num(new), -LARGEST_GUESS, LARGEST_GUESS)
        settled = position < reached[:, None]
        new = jnp.where(known, old, jnp.where(settled, new, guess))
        # An example that is not finite never converges: end its iteration.
        lost = ~jnp.where(settled, jnp.isfinite(new), True).all((0, 2))
        x = jax.lax.dynamic_update_slice_in_dim(x, new, start + 1, 2)
        own = jnp.where(known, window(log_scale, start + 1), affine.log_scale.sum(0))
        log_scale = jax.lax.dynamic_update_slice_in_dim(log_scale, own, start + 1, 1)
        iterations = iterations + (final < entries)
        final = jnp.where(lost, entries, reached)
        return _State(x, log_scale, final, caches, iterations, calls + 1)

    def body(state: _State) -> _State:
        left = T - jnp.clip(state.final.min() - 1, 0, T)
        smaller = sum((left <= size).astype(jnp.int32) for size in sizes[1:])
        return jax.lax.switch(smaller, [partial(iterate, size) for size in sizes], state)

    def unfinished(state: _State):
        return (state.final < entries).any() & (state.calls < max_iterations)

    zeros = jnp.zeros(B, jnp.int32)
    state = _State(
        z, jnp.zeros((B, T + 1), z.dtype), zeros + 1, decoder.pad_caches(None, T), zeros,
        jnp.int32(0),
    )
    state = jax.lax.while_loop(unfinished, body, state)
    x_BxTxD = state.x_DxBxE[:, :, entries - T : entries].transpose(1, 2, 0)
    x = block.layout.constrain(restore(x_BxTxD, order), 'batch', 'length', 'token')
    logdet = state.log_scale_BxE[:, :entries].sum(1)
    return Solution(x, logdet, state.iterations, state.final == entries, state.calls)
