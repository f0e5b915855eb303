"""The Transformer layer of a TarFlow block.

Shape suffixes: B images, T positions, C width, H heads, K head_dim.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from tarflow_jax.flow.attention import Array, at_least_float32, causal_attention, kernel_for


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """How a flow is laid out where nothing is split: the default of `TarFlow.layout`.

    `tarflow_jax.training.sharding.Layout` has the same for a mesh of devices.
    """

    devices_alone: ClassVar[bool] = False

    def place(self, x: Array, name: str) -> Array:
        """The activation or cache x, split over the devices as arrays of this name are."""
        return x

    def gather(self, params):
        """The parameters of one block, brought together for a loop of many short steps."""
        return params

    def gather_one(self, kernel: Array, path: str) -> Array:
        """A kernel brought together for one product; its path is that within a block."""
        return kernel

    def to_host(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def causal_attention(self, q: Array, k: Array, v: Array, scale) -> Array:
        """See `attention.causal_attention`, with the kernel for the default backend."""
        kernel = kernel_for(jax.default_backend(), q.dtype, q.shape[2])
        return causal_attention(kernel, q, k, v, scale)


class Linear(nn.Module):
    """Affine map from the trailing axes `inputs` to `outputs`: y = x @ kernel + bias.

    Kernel [*inputs, *outputs], bias [*outputs]; both start uniform in +-1/sqrt(fan_in) (the
    recipe's initialisation), or the kernel at zero.

    Args:
      path: of the module within a block, for the layout.
      parts: the outputs are so many arrays [*outputs], of a kernel [*inputs, parts, *outputs].
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    path: str = ''
    dtype: DTypeLike = jnp.float32
    layout: Any = OneDevice()
    zero_kernel: bool = False
    output_dtype: DTypeLike | None = None
    parts: int = 0

    @nn.compact
    def __call__(self, x: Array) -> Any:  # an array, or a list of `parts`
        bound = 1.0 / math.sqrt(math.prod(self.inputs))

        def uniform(key, shape, dtype=jnp.float32):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        kernel_init = nn.initializers.zeros if self.zero_kernel else uniform
        outputs = (self.parts,) * bool(self.parts) + self.outputs
        kernel = self.param('kernel', kernel_init, self.inputs + outputs)
        bias = self.param('bias', uniform, outputs)
        # Cast first: half the bytes to gather.
        kernel = self.layout.gather_one(kernel.astype(self.dtype), f'{self.path}/kernel')
        if not self.parts:
            return self._affine(x, kernel, bias)
        # One product per part: cutting up a large one would copy it, padding and all, on TPU.
        axis = len(self.inputs)
        return [
            self._affine(x, jax.lax.index_in_dim(kernel, i, axis, keepdims=False), bias[i])
            for i in range(self.parts)
        ]

    def _affine(self, x: Array, kernel: Array, bias: Array) -> Array:
        leading = x.shape[: x.ndim - len(self.inputs)]
        inputs, outputs = math.prod(self.inputs), math.prod(self.outputs)
        # Matrices, nothing else: XLA's CPU backend has a slow path for the gradient of a product
        # with two token axes, and on TPU heads as an axis of their own are copied to be one.
        x = x.reshape(-1, inputs).astype(self.dtype)
        kernel, bias = kernel.reshape(inputs, outputs), bias.reshape(outputs)
        # A float32 model means float32: TPUs (bfloat16) and GPUs (tf32) round the operands of a
        # default-precision matmul, which would cost the likelihood its digits.
        exact = self.dtype != jnp.bfloat16
        y = jax.lax.dot_general(
            x,
            kernel,
            (((1,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST if exact else None,
            preferred_element_type=at_least_float32(self.dtype),
        )
        y = (y + bias).astype(self.output_dtype or self.dtype)
        return y.reshape(*leading, *self.outputs)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, epsilon 1e-5, computed in float32."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param('scale', nn.initializers.ones, (self.width,))
        bias = self.param('bias', nn.initializers.zeros, (self.width,))
        return normalize(x, {'scale': scale, 'bias': bias}, axis=x.ndim - 1)


def normalize(x: Array, params, axis: int) -> Array:
    """Layer normalisation over an axis, whose scale and bias are in `params`."""
    wide = x.astype(at_least_float32(x.dtype))
    scale, bias = (
        jnp.expand_dims(params[name], [i for i in range(x.ndim) if i != axis])
        for name in ('scale', 'bias')
    )
    centred = wide - wide.mean(axis, keepdims=True)
    variance = jnp.square(centred).mean(axis, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(x.dtype)


def gelu(x: Array) -> Array:
    """x * Phi(x) with the exact normal distribution function."""
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Layer(nn.Module):
    """One pre-norm Transformer layer: h += proj(attention(norm(h))), h += mlp(norm(h))."""

    width: int
    head_dim: int = 64
    dtype: DTypeLike = jnp.float32
    layout: Any = OneDevice()

    @property
    def heads(self) -> int:
        return self.width // self.head_dim

    @nn.compact
    def __call__(self, h_BxTxC: Array, temperature=1.0) -> tuple[Array, None]:
        """Causal attention and the MLP; `network.Network` does the same over a key/value cache.

        Args:
          temperature: divides the attention logits; a number or [B, 1, 1, 1].
        Returns:
          h [B, T, C], and None, as `nn.scan` takes it.
        """
        B, T, C = h_BxTxC.shape
        H, K = self.heads, self.head_dim
        place = self.layout.place

        def linear(name, inputs, outputs, **more):
            path = f'layers/{name}'
            return Linear(inputs, outputs, path, self.dtype, self.layout, name=name, **more)

        x = LayerNorm(C, name='attention_norm')(h_BxTxC)
        qkv = linear('qkv', (C,), (H, K), parts=3)(x)
        q, k, v = (place(part.transpose(0, 2, 1, 3), 'heads') for part in qkv)
        x = self.layout.causal_attention(q, k, v, K**-0.5 / temperature)
        # Merged: kept for the backward pass, a last axis of head_dim would be padded to 128.
        x = place(x, 'heads').transpose(0, 2, 1, 3).reshape(B, T, C)
        x = checkpoint_name(x, 'attention').reshape(B, T, H, K)
        h_BxTxC = place(h_BxTxC + linear('attention_proj', (H, K), (C,))(x), 'tokens')

        x = LayerNorm(C, name='mlp_norm')(h_BxTxC)
        x = gelu(place(linear('mlp_in', (C,), (4 * C,))(x), 'hidden'))
        return place(h_BxTxC + linear('mlp_out', (4 * C,), (C,))(x), 'tokens'), None
