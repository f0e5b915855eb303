"""The order in which a block reads the tokens of a sequence.

An order is either a boolean (True reverses the sequence) or a permutation int32 [T] whose first
entry is the index of the first token read. Both may be traced.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def shift_right(x_BxTxD: Array) -> Array:
    """Shifts predictions right by one position; zeros at position 0."""
    return jnp.pad(x_BxTxD[:, :-1], ((0, 0), (1, 0), (0, 0)))


def reorder(x: Array, order, axis: int = 1) -> Array:
    """Reorders a token axis from raster order to the block's own order."""
    if isinstance(order, bool):
        return jnp.flip(x, axis) if order else x
    if _is_permutation(order):
        return jnp.take(x, order, axis=axis)
    return jnp.where(order, jnp.flip(x, axis), x)


def restore(x: Array, order, axis: int = 1) -> Array:
    """Inverts `reorder`."""
    return reorder(x, jnp.argsort(order) if _is_permutation(order) else order, axis)


def _is_permutation(order) -> bool:
    return jnp.issubdtype(jnp.result_type(order), jnp.integer)


def orders_of(orders, count: int, length: int) -> tuple[Any, ...]:
    """Returns the order of each of `count` blocks, for `reorder`.

    Args:
      orders: 'alternate' (raster, reversed, raster, ...), or one permutation of range(length) per
        block; its first entry is the index of the first token read.
    Raises:
      ValueError: if it is neither.
    """
    if isinstance(orders, str) and orders == 'alternate':
        return tuple(np.bool_(b % 2) for b in range(count))
    if isinstance(orders, str) or len(orders) != count:
        given = repr(orders) if isinstance(orders, str) else f'for {len(orders)} blocks'
        raise ValueError(
            f"orders {given} must be 'alternate', or have one permutation for each of the {count} "
            'blocks.'
        )
    found: list[Any] = []
    raster = np.arange(length)
    for b, order in enumerate(orders):
        order = np.asarray(order)
        if not np.array_equal(np.sort(order, axis=None), raster):
            raise ValueError(f'orders[{b}] is not a permutation of the {length} tokens.')
        if np.array_equal(order, raster) or np.array_equal(order, raster[::-1]):
            found.append(np.bool_(order[0] > 0))
        else:
            found.append(order.astype(np.int32))
    return tuple(found)
