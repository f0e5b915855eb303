"""The inverse of one block, one position after another.

Shape suffixes: B images, T patches, D numbers in a patch.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.model import Block, flip_if
from tarflow_jax.flow.network import Network

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
    network = Network.of(block, params, labels, reverse, steering, B, cache_dtype)

    def step(carry, inputs):
        x_DxB, caches, logdet_B = carry
        t, z_next_DxB = inputs
        *predicted, caches = network.predict(x_DxB[..., None], t, caches)
        log_scale, shift = (a[..., 0] for a in predicted)
        x_next_DxB = z_next_DxB * jnp.exp(log_scale) + shift
        return (x_next_DxB, caches, logdet_B + log_scale.sum(0)), x_next_DxB

    outputs = [z_TxDxB[:1]]
    carry = (z_TxDxB[0], None, jnp.zeros(B, z_TxDxB.dtype))
    for first, last in prefixes(T - 1):
        x, caches, logdet = carry
        inputs = (jnp.arange(first, last), z_TxDxB[first + 1 : last + 1])
        carry, rest = jax.lax.scan(step, (x, network.grown(caches, last), logdet), inputs)
        outputs.append(rest)
    x_BxTxD = jnp.concatenate(outputs).transpose(2, 0, 1)
    return flip_if(reverse, block.layout.place(x_BxTxD, 'tokens'), 1), carry[2]


def prefixes(length: int) -> list[tuple[int, int]]:
    """(first, last) of the few stretches of 0..length - 1 between which the caches grow."""
    count = max(1, min(PREFIXES, length // SHORTEST_PREFIX))
    size = max(1, -(-length // count))
    return [(first, min(first + size, length)) for first in range(0, length, size)]
