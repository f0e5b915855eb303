"""Parallel decoding: the inverse of a block as a fixed point over a window of positions.

The inverse solves x = z * exp(a(x)) + m(x), where a and m at a position depend on the positions
before it only. One iteration evaluates the right-hand side at all positions of a window at once;
the first of them that is not final becomes exact, and in a trained flow many behind it are nearly
so. Iterations go on, over the key/value cache of what is final, and the window moves along with
the first position that is not:

- one window as long as the sequence is Jacobi iteration;
- `segments` windows, each over the cache of those before it, are Gauss-Seidel-Jacobi iteration
  (arXiv 2505.12849). There a segment waits until all of the one before it is done; here the window
  moves on at once with every position that is, which takes no more iterations, and fewer mostly.

Shape suffixes: B images, T patches, D numbers in a patch. W is the positions of a window.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.model import Block, flip_if
from tarflow_jax.flow.network import LayerCache, Network

# Guesses behind the exact positions may overflow where the solution does not; one infinite key
# would reach all positions of its image. No solution that is of use lies beyond this.
LARGEST_GUESS = 1e4


class _State(NamedTuple):
    """Of the loop.

    Args:
      x_DxBxT: one position more, final up to `final`, guesses from there on; none reads the last.
      final: [B], how many positions are.
      iterations: [B], how many each image took.
      calls: how many the batch took.
    """

    x_DxBxT: Array
    final: Array
    caches: list[LayerCache]
    iterations: Array
    calls: Array  # not `count`, which tuples have


class Solution(NamedTuple):
    """Of a block: x [B, T, D], iterations [B] and converged [B] of each image, network calls."""

    x: Array
    iterations: Array | np.ndarray
    converged: Array | np.ndarray
    calls: Array | np.integer


def window_sizes(num_patches: int, segments: int) -> list[int]:
    """The window, and the shorter ones for the end of the sequence, which it would reach beyond.

    The whole sequence has an attention kernel of its own, which no part of it is faster than.
    """
    if segments == 1:
        return [num_patches]
    window = -(-num_patches // segments)
    return [window >> i for i in range(3) if i == 0 or window >> i >= 8]


@partial(jax.jit, static_argnums=(0, 1), static_argnames='cache_dtype')
def solve_block(
    block: Block,
    segments: int,
    params,
    z_BxTxD,
    labels,
    reverse,
    steering: Steering,
    tolerance,
    max_iterations,
    *,
    cache_dtype=None,
) -> Solution:
    """The inverse of one block as `inverse.invert_block`, iterated over windows of positions.

    A position is final when it is exact, or when no position before it changed by more than the
    tolerance in the iteration that made it. Final positions stay as they are, so that an image's
    result does not depend on the others of its batch.

    Args:
      segments: the window has a `segments`-th of the positions; 1 iterates over all of them.
      tolerance: in units of x.
      max_iterations: where to stop, converged or not; T - 1 are always enough.
    """
    B, T, _ = z_BxTxD.shape
    z = jnp.pad(flip_if(reverse, z_BxTxD, 1).transpose(2, 0, 1), ((0, 0), (0, 0), (0, 1)))
    network = Network.of(block, params, labels, reverse, steering, B, cache_dtype)
    sizes = window_sizes(T, segments)

    def iterate(W: int, state: _State) -> _State:
        x, final, caches, iterations, calls = state
        # The last final position is the first whose prediction has not been made.
        start = jnp.clip(final.min() - 1, 0, T - W)
        slice_of = lambda a, first: jax.lax.dynamic_slice_in_dim(a, first, W, 2)  # noqa: E731
        log_scale, shift, caches = network.predict(slice_of(x, start), start, caches)
        old = slice_of(x, start + 1)
        new = slice_of(z, start + 1) * jnp.exp(log_scale) + shift
        position = start + 1 + jnp.arange(W)

        known = position < final[:, None]
        same = known | (abs(new - old).max(0) <= tolerance)
        first_changed = start + 1 + jnp.cumprod(same, 1).sum(1)
        # The first changed position is final for all that: those before it are.
        reached = jnp.minimum(jnp.maximum(first_changed, final) + 1, start + 1 + W)
        reached = jnp.clip(reached, final, T)
        guess = jnp.clip(jnp.nan_to_num(new), -LARGEST_GUESS, LARGEST_GUESS)
        settled = position < reached[:, None]
        new = jnp.where(known, old, jnp.where(settled, new, guess))
        # An image that is not finite stays so, and would make its own guesses NaN to the end.
        lost = ~jnp.where(settled, jnp.isfinite(new), True).all((0, 2))
        x = jax.lax.dynamic_update_slice_in_dim(x, new, start + 1, 2)
        iterations = iterations + (final < T)
        return _State(x, jnp.where(lost, T, reached), caches, iterations, calls + 1)

    def body(state: _State) -> _State:
        left = T - jnp.clip(state.final.min() - 1, 0, T)
        smaller = sum((left <= size).astype(jnp.int32) for size in sizes[1:])
        return jax.lax.switch(smaller, [partial(iterate, size) for size in sizes], state)

    def unfinished(state: _State):
        return (state.final < T).any() & (state.calls < max_iterations)

    zeros = jnp.zeros(B, jnp.int32)
    state = _State(z, zeros + 1, network.grown(None, T), zeros, jnp.int32(0))
    state = jax.lax.while_loop(unfinished, body, state)
    x_BxTxD = flip_if(reverse, state.x_DxBxT[:, :, :T].transpose(1, 2, 0), 1)
    x = block.layout.place(x_BxTxD, 'tokens')
    return Solution(x, state.iterations, state.final == T, state.calls)
