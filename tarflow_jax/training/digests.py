"""Checksums of arrays that do not depend on how the arrays are sharded.

A checksum is the sum, modulo 2^32, of a hash of every number and its position. It changes if any
number changes or numbers are permuted, but not with the mesh. On the devices it costs one pass over
the array.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Smaller arrays are hashed on the host: compiling a program for each shape would take longer.
_LARGE = 2**20  # bytes
_GOLDEN, *_MIX = np.array([0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35], np.uint32)


def digests(tree) -> dict[str, str]:
    """Returns 'DTYPE SHAPE CHECKSUM' of every array by its path, as params/block_0/proj_in/bias.

    All processes must call it, with arrays of the same shapes and shardings.
    """
    sums = jax.tree.leaves(sums_of_hashes(tree))
    return {name: f'{kind} {total:08x}' for (name, kind), total in zip(kinds(tree).items(), sums)}


def kinds(tree) -> dict[str, str]:
    """Returns 'DTYPE SHAPE' of every array by its path; the arrays may be abstract."""
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'):
        f'{np.dtype(leaf.dtype).name} {"x".join(map(str, leaf.shape)) or "scalar"}'
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def sums_of_hashes(tree):
    """Returns the checksum of every array of a tree, as an integer."""
    # One at a time: on CPUs, programs that run concurrently and communicate with other processes
    # can deadlock.
    sums = jax.tree.map(
        lambda x: jax.block_until_ready(_sum_there(x)) if _stays(x) else _here(x), tree
    )
    return jax.tree.map(
        lambda leaf, found: int(found) if _stays(leaf) else _sum_here(found),
        tree, jax.device_get(sums),
    )


def _stays(leaf) -> bool:
    if not isinstance(leaf, jax.Array):
        return False
    return leaf.nbytes >= _LARGE or not (leaf.is_fully_addressable or leaf.is_fully_replicated)


def _here(leaf):
    return leaf.addressable_data(0) if getattr(leaf, 'is_fully_replicated', False) else leaf


@jax.jit
def _sum_there(x):
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    width = jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}')
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_hashed(bits, place), dtype=jnp.uint32)


def _sum_here(x) -> int:
    x = np.ascontiguousarray(x)
    bits = x.reshape(-1).view(f'uint{8 * min(x.dtype.itemsize, 4)}').astype(np.uint32)
    place = np.arange(bits.size, dtype=np.uint32)
    return int(np.sum(_hashed(bits, place), dtype=np.uint32))


def _hashed(bits, place):
    """Hashes with the finalizer of MurmurHash3; at each position it permutes all uint32."""
    h = bits ^ place * _GOLDEN
    h = (h ^ h >> 16) * _MIX[0]
    h = (h ^ h >> 13) * _MIX[1]
    return h ^ h >> 16
