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

Shape suffixes: B images, T patches, W positions of a window, D numbers in a patch.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.layers import Layer, LayerCache, empty_cache
from tarflow_jax.flow.model import Block, flip_if

# Guesses behind the exact positions may overflow where the solution does not; one infinite key
# would reach all positions of its image. No solution that is of use lies beyond this.
LARGEST_GUESS = 1e4


class _State(NamedTuple):
    """Of the loop.

    Args:
      x: [B, T + 1, D], final up to `final`, guesses from there on; nothing reads the last one.
      final: [B], how many positions are.
      iterations: [B], how many each image took.
      calls: how many the batch took.
    """

    x: Array
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
    z = jnp.pad(flip_if(reverse, z_BxTxD, 1), ((0, 0), (0, 1), (0, 0)))
    predict, empty = _conditioner(block, params, labels, reverse, steering, B, cache_dtype)
    sizes = window_sizes(T, segments)

    def iterate(W: int, state: _State) -> _State:
        x, final, caches, iterations, calls = state
        # The last final position is the first whose prediction has not been made.
        start = jnp.clip(final.min() - 1, 0, T - W)
        slice_of = lambda a, first: jax.lax.dynamic_slice_in_dim(a, first, W, 1)  # noqa: E731
        log_scale, shift, caches = predict(slice_of(x, start), start, caches)
        old = slice_of(x, start + 1)
        new = slice_of(z, start + 1) * jnp.exp(log_scale) + shift
        position = start + 1 + jnp.arange(W)

        known = position < final[:, None]
        same = known | (abs(new - old).max(-1) <= tolerance)
        first_changed = start + 1 + jnp.cumprod(same, 1).sum(1)
        # The first changed position is final for all that: those before it are.
        reached = jnp.minimum(jnp.maximum(first_changed, final) + 1, start + 1 + W)
        reached = jnp.clip(reached, final, T)
        guess = jnp.clip(jnp.nan_to_num(new), -LARGEST_GUESS, LARGEST_GUESS)
        settled = (position < reached[:, None])[..., None]
        new = jnp.where(known[..., None], old, jnp.where(settled, new, guess))
        # An image that is not finite stays so, and would make its own guesses NaN to the end.
        lost = ~jnp.where(settled, jnp.isfinite(new), True).all((1, 2))
        x = jax.lax.dynamic_update_slice_in_dim(x, new, start + 1, 1)
        iterations = iterations + (final < T)
        return _State(x, jnp.where(lost, T, reached), caches, iterations, calls + 1)

    def body(state: _State) -> _State:
        left = T - jnp.clip(state.final.min() - 1, 0, T)
        smaller = sum((left <= size).astype(jnp.int32) for size in sizes[1:])
        return jax.lax.switch(smaller, [partial(iterate, size) for size in sizes], state)

    def unfinished(state: _State):
        return (state.final < T).any() & (state.calls < max_iterations)

    zeros = jnp.zeros(B, jnp.int32)
    state = _State(z, zeros + 1, empty(), zeros, jnp.int32(0))
    state = jax.lax.while_loop(unfinished, body, state)
    x = block.layout.place(flip_if(reverse, state.x[:, :T], 1), 'tokens')
    return Solution(x, state.iterations, state.final == T, state.calls)


def _conditioner(block: Block, params, labels, reverse, steering: Steering, batch, cache_dtype):
    """Two functions: what a block predicts at a window of positions, and empty caches for it.

    The first takes x [B, W, D], its first position and the caches, and returns the guided log-scale
    and shift [B, W, D] of the positions one later, and the caches with those of the window.
    """
    place = block.layout.place
    params = block.layout.gather(params)
    positions = flip_if(reverse, params['position_embedding'], 0)
    labels, temperature = steering.branch(labels, batch)
    layer = Layer(block.width, block.head_dim, block.dtype, block.layout)
    # Unstacked outside of the loop: inside, each iteration would copy every layer's weights.
    layers = [jax.tree.map(lambda a, i=i: a[i], params['layers']) for i in range(block.num_layers)]

    def predict(x_BxWxD, start, caches):
        x = jnp.repeat(x_BxWxD, steering.branches, axis=0)
        at = jax.lax.dynamic_slice_in_dim(positions, start, x.shape[1])
        h = block.apply({'params': params}, x, at, labels, method='embed')
        filled = []
        for layer_params, cache in zip(layers, caches):
            h, cache = layer.apply({'params': layer_params}, h, temperature, cache, start)
            filled.append(cache)
        predicted: Any = block.apply({'params': params}, h, method='predict')
        log_scale, shift = predicted
        return *steering.guide(log_scale, shift, start, axis=0), filled

    def empty() -> list[LayerCache]:
        dtype = cache_dtype or block.dtype
        rows = batch * steering.branches
        cache = empty_cache(rows, layer.heads, block.num_patches, block.head_dim, dtype)
        return [LayerCache(*(place(x, 'heads') for x in cache)) for _ in layers]

    return predict, empty
