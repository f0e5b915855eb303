"""Attention over a key/value cache, and causal attention kernels for whole sequences.

Shape suffixes: B images, H heads, S queries, T keys, K head_dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import tpu_attention
from tarflow_jax.flow.products import product

Array = jax.Array


@jax.named_scope('attention')  # the name in profiles and compiled programs
def attention(
    q_BxHxSxK: Array, k_BxHxTxK: Array, v_BxHxTxK: Array, mask: Array, scale,
    precision: str = 'highest',
) -> Array:
    """Computes softmax attention, with logits and softmax in float32.

    Args:
      mask: broadcastable to [B, H, S, T]; True where a query attends to a key.
      scale: multiplies the logits; a number, or an array broadcastable to [B, H, S, T].
      precision: one of PRECISIONS.
    Returns:
      [B, H, S, K] in the dtype of q.
    """
    logits = product('bhsk,bhtk->bhst', q_BxHxSxK, k_BxHxTxK, precision)
    logits = jnp.where(mask, logits * scale, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(q_BxHxSxK.dtype)
    out = product('bhst,bhtk->bhsk', weights, v_BxHxTxK, precision)
    return out.astype(q_BxHxSxK.dtype)


def kernel_for(platform: str, dtype, length: int) -> str:
    """Chooses the kernel for causal attention over `length` positions on 'tpu', 'gpu' or 'cpu'.

    'whole_head', 'splash' (for longer sequences) and 'cudnn' keep the T x T logits on the chip.
    They are used for bfloat16 only: they round float32 products, which would cost the likelihood
    several digits. 'xla' handles everything else.
    """
    if dtype != jnp.bfloat16:
        return 'xla'
    if platform == 'tpu' and length % _BLOCK == 0:
        return 'whole_head' if length <= tpu_attention.MAX_LENGTH else 'splash'
    return 'cudnn' if platform == 'gpu' else 'xla'


def check_kernel(kernel: str, platform: str, dtype, length: int) -> None:
    """Checks that a kernel chosen by name runs on these devices; 'auto' always does.

    Raises:
      ValueError: if it does not; the message starts with the field name, 'attention'.
    """
    wanted = {'cudnn': 'gpu', 'whole_head': 'tpu', 'splash': 'tpu'}.get(kernel, platform)
    reason = None
    if wanted != platform:
        reason = f'runs on {wanted.upper()}s, but the devices are {platform.upper()}s'
    elif kernel == 'cudnn' and dtype != jnp.bfloat16:
        reason = f'needs bfloat16, but the dtype of the model is {np.dtype(dtype).name}'
    elif kernel.startswith(('splash', 'whole_head')) and length % _BLOCK:
        reason = f'needs a multiple of {_BLOCK} patches, but the model has {length}'
    elif kernel.startswith('whole_head') and length > tpu_attention.MAX_LENGTH:
        reason = f'takes up to {tpu_attention.MAX_LENGTH} patches, but the model has {length}'
    if reason:
        raise ValueError(f"attention {kernel!r} {reason}; choose 'auto'.")


@jax.named_scope('attention')
def causal_attention(
    kernel: str, q: Array, k: Array, v: Array, scale, precision: str = 'highest'
) -> Array:
    """Computes causal self-attention. Inputs and result are [B, H, T, K].

    Args:
      kernel: one of KERNELS, such as `kernel_for` returns.
      scale: multiplies the logits; a number, or [B, 1, 1, 1].
      precision: one of PRECISIONS; only 'xla' uses it.
    """
    more = {'precision': precision} if kernel == 'xla' else {}
    return KERNELS[kernel](q, k, v, scale, **more)


def _xla(q, k, v, scale, precision='highest'):
    T = q.shape[2]
    return attention(q, k, v, jnp.tril(jnp.ones((T, T), bool)), scale, precision)


def _cudnn(q, k, v, scale):
    # cuDNN takes one scale for all images, so scale q instead; exact if the scale is a power of 2.
    q, k, v = (x.swapaxes(1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    return jax.nn.dot_product_attention(
        q, k, v, scale=1.0, is_causal=True, implementation='cudnn'
    ).swapaxes(1, 2)


def _whole_head(q, k, v, scale, interpret=False):
    B, H, T, K = q.shape
    missing = -H * K % tpu_attention.whole_lanes(K)  # zero-pad to whole groups of heads
    flat = lambda x: jnp.pad(  # noqa: E731
        x.swapaxes(1, 2).reshape(B, T, H * K), ((0, 0), (0, 0), (0, missing))
    )
    q, k, v = (flat(x) for x in ((q * scale).astype(q.dtype), k, v))
    out = tpu_attention.whole_head_attention(q, k, v, K, interpret)
    return out[..., : H * K].reshape(B, T, H, K).swapaxes(1, 2)


_BLOCK = 128  # tiles are multiples of the chip's 128 lanes


def _splash(q, k, v, scale, interpret=False):
    kernel = _splash_kernel(q.shape[1], q.shape[2], interpret)
    return jax.vmap(kernel)((q * scale).astype(q.dtype), k, v)


def _splash_kernel(heads: int, length: int, interpret: bool):
    # Importing it takes a third of a second, so only TPU users pay for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = max(b for b in (128, 256, 512) if length % b == 0)
    minor = splash.QKVLayout.SEQ_MINOR
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        use_fused_bwd_kernel=True,  # five tile products instead of seven
        # Any other layout would pad heads of 64 channels to 128 in HBM.
        q_layout=minor, k_layout=minor, v_layout=minor,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
    return splash.make_splash_mha_single_device(mask, block_sizes=sizes, interpret=interpret)


KERNELS: dict[str, Callable[..., Array]] = {
    'xla': _xla,
    'cudnn': _cudnn,
    'whole_head': _whole_head,
    'splash': _splash,
    # Interpreted versions run on any device, slowly.
    'whole_head_interpreted': functools.partial(_whole_head, interpret=True),
    'splash_interpreted': functools.partial(_splash, interpret=True),
}
