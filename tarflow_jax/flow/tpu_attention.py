"""A TPU kernel for causal attention over sequences short enough that a whole head fits on chip.

Heads are narrower than the 128 lanes of a TPU's registers and matrix unit. The kernel processes a
group of heads that fills 128 adjacent channels of [B, T, C], the layout of the neighbouring layers,
so nothing is transposed or padded in HBM. The product of one head runs over all 128 lanes, with the
other heads' channels zeroed in one operand; padding a single head would cost the same.

All keys are on chip, so the kernel normalizes each row of logits in one pass. The backward pass
recomputes the logits from queries and keys; no softmax statistics are saved. Keys after a tile of
queries are skipped.

Shape suffixes: B images, T positions, C = H K channels of all heads.
"""

import functools
import math

import jax
import jax.numpy as jnp

Array = jax.Array

MAX_LENGTH = 1024  # tiles of logits and two buffers of whole heads must fit in 16 MB


def whole_lanes(head_dim: int) -> int:
    """Returns the channels of the smallest group of heads that fills whole registers."""
    return math.lcm(head_dim, 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def whole_head_attention(
    q_BxTxC: Array, k_BxTxC: Array, v_BxTxC: Array, head_dim: int, interpret: bool
) -> Array:
    """Computes causal softmax(q k^T) v for each head, with logits and softmax in float32.

    Returns:
      [B, T, C].
    Raises:
      ValueError: unless T is a multiple of 128 and C a multiple of `whole_lanes(head_dim)`.
    """
    return _call(_forward, (q_BxTxC, k_BxTxC, v_BxTxC), 1, 2, head_dim, interpret)


def _save(q, k, v, head_dim, interpret):
    return whole_head_attention(q, k, v, head_dim, interpret), (q, k, v)


def _pull(head_dim, interpret, saved, gradient):
    return tuple(_call(_backward, (*saved, gradient), 3, 5, head_dim, interpret))


whole_head_attention.defvjp(_save, _pull)


def _call(body, arrays, outputs: int, products: int, head_dim: int, interpret: bool):
    """Runs a kernel over images and head groups; `products` is the matrix products per tile."""
    # Importing it takes a third of a second, so only TPU users pay for it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, length, channels = arrays[0].shape
    lanes = whole_lanes(head_dim)
    tile = 256 if length % 256 == 0 else 128
    if length % tile or channels % lanes:
        raise ValueError(
            f"attention 'whole_head' needs a multiple of {tile} positions and of {lanes} channels, "
            f"not {length} positions and {channels} channels (heads of {head_dim}); use "
            "model.attention 'xla'."
        )
    block = pl.BlockSpec((None, length, lanes), lambda image, group: (image, 0, group))
    tiles = length // tile
    # Counts the zeroed lanes of other heads and, of the logits, the tiles up to the diagonal.
    flops = products * 2 * batch * (channels // head_dim) * lanes
    flops *= length * length * (tiles + 1) // (2 * tiles)
    found = pl.pallas_call(
        functools.partial(body, head_dim=head_dim, tile=tile),
        out_shape=[jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)] * outputs,
        grid=(batch, channels // lanes),
        in_specs=[block] * len(arrays),
        out_specs=[block] * outputs,
        scratch_shapes=[pltpu.VMEM((length, lanes), jnp.float32)] * (2 if outputs == 3 else 0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
        cost_estimate=pl.CostEstimate(
            flops=flops,
            transcendentals=flops // (2 * products * lanes),
            bytes_accessed=(len(arrays) + outputs) * arrays[0].nbytes,
        ),
        interpret=interpret,
        name=f'whole_head_attention{body.__name__}',
    )(*arrays)
    return found[0] if outputs == 1 else found


def _heads(lanes: int, head_dim: int) -> list[Array]:
    """Returns, for each head of a group, a mask of its lanes, [1, lanes]."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
    return [(lane >= h) & (lane < h + head_dim) for h in range(0, lanes, head_dim)]


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Multiplies two matrices in float32, contracting the given axis of each."""
    precision = None if a.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    return jax.lax.dot_general(
        a, b, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
        preferred_element_type=jnp.float32,
    )


def _probabilities(logits: Array, first_query: int, keys: int) -> tuple[Array, Array]:
    """Returns the exponentials of causally masked logits, and their sums along axis `keys`.

    Their quotient is the softmax. Queries start at `first_query`, keys at 0.
    """
    at = functools.partial(jax.lax.broadcasted_iota, jnp.int32, logits.shape)
    logits = jnp.where(at(keys) <= first_query + at(1 - keys), logits, -jnp.inf)
    exponentials = jnp.exp(logits - logits.max(keys, keepdims=True))
    return exponentials, exponentials.sum(keys, keepdims=True)


def _forward(q_ref, k_ref, v_ref, out_ref, *, head_dim: int, tile: int):
    length, lanes = q_ref.shape
    dtype = q_ref.dtype
    for start in range(0, length, tile):
        rows, seen = slice(start, start + tile), slice(0, start + tile)
        out = jnp.zeros((tile, lanes), jnp.float32)
        for mine in _heads(lanes, head_dim):
            logits = _product(jnp.where(mine, q_ref[rows], 0), k_ref[seen], (1, 1))
            weights, total = _probabilities(logits, start, keys=1)
            mixed = _product(weights.astype(dtype), v_ref[seen], (1, 0))
            out += jnp.where(mine, mixed / total, 0)
        out_ref[rows] = out.astype(dtype)


def _backward(
    q_ref, k_ref, v_ref, g_ref, dq_ref, dk_ref, dv_ref, dk_sum, dv_sum, *, head_dim: int, tile: int
):
    length, lanes = q_ref.shape
    dtype = q_ref.dtype
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    k_transposed = k_ref[...].T
    for start in range(0, length, tile):
        rows, seen = slice(start, start + tile), slice(0, start + tile)
        dq = jnp.zeros((tile, lanes), jnp.float32)
        for mine in _heads(lanes, head_dim):
            q, g = (jnp.where(mine, ref[rows], 0) for ref in (q_ref, g_ref))
            # Logits are [keys, queries]: sums over keys then stay within a lane, and only the
            # product for dq needs a transposed operand, k.
            weights, total = _probabilities(_product(k_ref[seen], q, (1, 1)), start, keys=0)
            weights = weights / total
            d_weights = _product(v_ref[seen], g, (1, 1))
            weighted = weights * d_weights
            d_logits = weighted - weights * weighted.sum(0, keepdims=True)
            d_logits = d_logits.astype(dtype)
            dv_sum[seen] += _product(weights.astype(dtype), g, (1, 0))
            dk_sum[seen] += _product(d_logits, q, (1, 0))
            dq += jnp.where(mine, _product(k_transposed[:, seen], d_logits, (1, 0)).T, 0)
        dq_ref[rows] = dq.astype(dtype)
    dk_ref[...] = dk_sum[...].astype(dtype)
    dv_ref[...] = dv_sum[...].astype(dtype)
