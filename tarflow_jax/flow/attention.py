"""Attention: over a key/value cache, and causal over whole sequences by the kernel of the chip.

Shape suffixes: B images, H heads, S queries, T keys, K head_dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from tarflow_jax.flow import tpu_attention

Array = jax.Array


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """float32 for narrower types; float64 stays (the tests differentiate in float64)."""
    return jnp.promote_types(dtype, jnp.float32)


# Of float32 matrix products on TPU: six, three and one passes in bfloat16, which its matrix unit
# multiplies. On GPU all but 'highest' allow TF32; a CPU multiplies float32 whatever it is.
PRECISIONS = ('highest', 'high', 'default')


def product_precision(dtype: DTypeLike, precision: str) -> str | None:
    """The `precision` of a matrix product of operands of this type; None for bfloat16."""
    return None if dtype == jnp.bfloat16 else precision


@jax.named_scope('attention')  # in profiles and compiled programs
def attention(
    q_BxHxSxK: Array, k_BxHxTxK: Array, v_BxHxTxK: Array, mask: Array, scale,
    precision: str = 'highest',
) -> Array:
    """Softmax attention, logits and softmax in float32. Returns [B, H, S, K] in q's type.

    Args:
      mask: broadcastable to [B, H, S, T], True where a query may look.
      scale: multiplies the logits; a number, or an array broadcastable to [B, H, S, T].
      precision: one of PRECISIONS.
    """
    wide = at_least_float32(q_BxHxSxK.dtype)
    passes = product_precision(q_BxHxSxK.dtype, precision)
    logits = jnp.einsum(
        'bhsk,bhtk->bhst', q_BxHxSxK, k_BxHxTxK, precision=passes, preferred_element_type=wide
    )
    logits = jnp.where(mask, logits * scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BxHxSxK.dtype)
    out = jnp.einsum(
        'bhst,bhtk->bhsk', weights, v_BxHxTxK, precision=passes, preferred_element_type=wide
    )
    return out.astype(q_BxHxSxK.dtype)


def kernel_for(platform: str, dtype, length: int) -> str:
    """The kernel for causal attention over `length` positions on 'tpu', 'gpu' or 'cpu'.

    'whole_head', 'splash' (for longer sequences) and 'cudnn' keep the T x T logits on the chip.
    They are for bfloat16: their float32 products are rounded, which would cost the likelihood its
    digits. 'xla' is for everything else.
    """
    if dtype != jnp.bfloat16:
        return 'xla'
    if platform == 'tpu' and length % _BLOCK == 0:
        return 'whole_head' if length <= tpu_attention.MAX_LENGTH else 'splash'
    return 'cudnn' if platform == 'gpu' else 'xla'


def check_kernel(kernel: str, platform: str, dtype, length: int) -> None:
    """Checks that a kernel chosen by name runs on these devices; 'auto' always does.

    Raises:
      ValueError: one sentence that begins with the name of the field, 'attention'.
    """
    wanted = {'cudnn': 'gpu', 'whole_head': 'tpu', 'splash': 'tpu'}.get(kernel, platform)
    reason = None
    if wanted != platform:
        reason = f'is for {wanted.upper()}s, and the devices are {platform.upper()}s'
    elif kernel == 'cudnn' and dtype != jnp.bfloat16:
        reason = f'is for the dtype bfloat16, and that of the model is {np.dtype(dtype).name}'
    elif kernel.startswith(('splash', 'whole_head')) and length % _BLOCK:
        reason = f'needs a multiple of {_BLOCK} patches, and the model has {length}'
    elif kernel.startswith('whole_head') and length > tpu_attention.MAX_LENGTH:
        reason = f'is for up to {tpu_attention.MAX_LENGTH} patches, and the model has {length}'
    if reason:
        raise ValueError(f"attention {kernel!r} {reason}; choose 'auto'.")


@jax.named_scope('attention')
def causal_attention(
    kernel: str, q: Array, k: Array, v: Array, scale, precision: str = 'highest'
) -> Array:
    """Attention of every position to itself and those before it: [B, H, T, K] each, and returned.

    Args:
      kernel: one of KERNELS, as `kernel_for` chooses.
      scale: multiplies the logits; a number, or [B, 1, 1, 1].
      precision: of 'xla', one of PRECISIONS.
    """
    more = {'precision': precision} if kernel == 'xla' else {}
    return KERNELS[kernel](q, k, v, scale, **more)


def _xla(q, k, v, scale, precision='highest'):
    T = q.shape[2]
    return attention(q, k, v, jnp.tril(jnp.ones((T, T), bool)), scale, precision)


def _cudnn(q, k, v, scale):
    # Scaling q instead of the logits allows one scale per image, and is exact for a power of two.
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, implementation='cudnn'
    ).swapaxes(1, 2)


def _whole_head(q, k, v, scale, interpret=False):
    B, H, T, K = q.shape
    missing = -H * K % tpu_attention.whole_lanes(K)  # of heads too few, filled up with zeros
    flat = lambda x: jnp.pad(  # noqa: E731
        x.swapaxes(1, 2).reshape(B, T, H * K), ((0, 0), (0, 0), (0, missing))
    )
    q, k, v = (flat(x) for x in ((q * scale).astype(q.dtype), k, v))
    out = tpu_attention.whole_head_attention(q, k, v, K, interpret)
    return out[..., : H * K].reshape(B, T, H, K).swapaxes(1, 2)


_BLOCK = 128  # the kernel's tiles are multiples of the 128 lanes of the chip


def _splash(q, k, v, scale, interpret=False):
    kernel = _splash_kernel(q.shape[1], q.shape[2], interpret)
    return jax.vmap(kernel)((q * scale).astype(q.dtype), k, v)


def _splash_kernel(heads: int, length: int, interpret: bool):
    # Imported here: it takes a third of a second, which only TPUs should pay for.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = max(b for b in (128, 256, 512) if length % b == 0)
    minor = splash.QKVLayout.SEQ_MINOR
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,  # five products of tiles instead of seven
        # Heads of 64 channels would be padded to 128 in HBM.
        q_layout=minor, k_layout=minor, v_layout=minor,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


KERNELS: dict[str, Callable[..., Array]] = {
    'xla': _xla,
    'cudnn': _cudnn,
    'whole_head': _whole_head,
    'splash': _splash,
    # These two run anywhere, slowly.
    'whole_head_interpreted': functools.partial(_whole_head, interpret=True),
    'splash_interpreted': functools.partial(_splash, interpret=True),
}
