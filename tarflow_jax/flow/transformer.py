"""The Transformer layer that training, the likelihood and both decoders share.

Training runs on whole sequences with the channels last. Decoding runs on a few positions at a time,
with a key/value cache and the channels first. Its matrix products have few columns; with the kernel
(transposed once) as the left operand, XLA multiplies them a third faster on a CPU and can choose
the memory layout on TPU and GPU. `ChannelsLast` and `ChannelsFirst` hold everything that depends on
the position of the channels; `layer` works with both.

Shape suffixes: N sequences, S positions of a call, T of the cache, C width, H heads, K head_dim.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from tarflow_jax.flow.attention import Array, attention, causal_attention, kernel_for
from tarflow_jax.flow.parameters import Parameter, linear
from tarflow_jax.flow.products import at_least_float32, product


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """The default `layout` of a flow: all arrays on one device.

    `tarflow_jax.training.sharding.Layout` has the same methods for a mesh of devices.
    """

    devices_alone: ClassVar[bool] = False

    def constrain(self, x: Array, *axes: str) -> Array:
        """Shards an activation or a cache over the mesh by the logical names of its axes."""
        return x

    def gather(self, kernel: Array, axes: tuple[str, ...]) -> Array:
        """Gathers a parameter over the `fsdp` axis of the mesh."""
        return kernel

    def to_host(self, x: Array) -> np.ndarray:
        return np.asarray(x)

    def causal_attention(
        self, q: Array, k: Array, v: Array, scale, precision: str = 'highest'
    ) -> Array:
        """Calls `attention.causal_attention` with the kernel for the default backend."""
        kernel = kernel_for(jax.default_backend(), q.dtype, q.shape[2])
        return causal_attention(kernel, q, k, v, scale, precision)


class LayerCache(NamedTuple):
    """The key/value cache of one layer, both [N, H, T, K]."""

    key: Array
    value: Array


def layer_parameters(width: int, head_dim: int) -> dict[str, dict[str, Parameter]]:
    """Describes the arrays of one `layer`."""
    C, hidden = width, 4 * width
    heads, qkv = {'heads': C // head_dim, 'head_dim': head_dim}, {'qkv': 3}
    norm = {
        'scale': Parameter((C,), ('width',), 'ones'),
        'bias': Parameter((C,), ('width',), 'zeros'),
    }
    # Contracted axes have their own names because the mesh shards them differently.
    return {
        'attention_norm': norm,
        'qkv': linear({'inputs': C}, qkv | heads),
        'attention_proj': linear(
            {'heads': C // head_dim, 'head_inputs': head_dim}, {'outputs': C}, bias='width'
        ),
        'mlp_norm': norm,
        'mlp_in': linear({'inputs': C}, {'hidden': hidden}, bias='width'),
        'mlp_out': linear({'hidden_inputs': hidden}, {'outputs': C}, bias='width'),
    }


# Logical axes of the kernels, for `gather` of a layout.
_KERNEL_AXES = {
    name: tree['kernel'].axes
    for name, tree in layer_parameters(1, 1).items() if 'kernel' in tree
} | {'proj_in': ('token', 'width'), 'proj_out': ('width', 'prediction')}


@dataclasses.dataclass(frozen=True)
class ChannelsLast:
    """Activations [N, S, C] and kernels [*inputs, *outputs], as in training."""

    axis: ClassVar[int] = 2  # of the channels

    dtype: DTypeLike
    layout: Any
    precision: str = 'highest'

    def positions(self, h: Array) -> int:
        return h.shape[1]

    def constrain(self, h: Array, channels: str) -> Array:
        return self.layout.constrain(h, 'batch', 'length', channels)

    def normalize(self, h: Array, params) -> Array:
        return normalize(h, params, self.axis, self.dtype)

    def linear(self, params, x: Array, name: str, output_dtype: DTypeLike | None = None) -> Array:
        """Returns x @ kernel + bias, contracting the input axes of the kernel called `name`."""
        return self._affine(x, self._gathered(params, name), params['bias'], output_dtype)

    def qkv(self, params, x: Array, head_dim: int, whole: bool) -> Sequence[Array]:
        """Returns queries, keys and values, [N, H, S, K] each."""
        kernel = self._gathered(params, 'qkv')
        # Three products: on TPU, splitting one large result would copy it with its padding.
        return [
            self._affine(x, kernel[:, i], params['bias'][i]).transpose(0, 2, 1, 3)
            for i in range(3)
        ]

    def attention_proj(self, params, x_NxHxSxK: Array) -> Array:
        N, H, S, K = x_NxHxSxK.shape
        # The backward pass saves x; with head_dim as the last axis it would be padded to 128.
        x = x_NxHxSxK.transpose(0, 2, 1, 3).reshape(N, S, H * K)
        return self.linear(params, checkpoint_name(x, 'attention'), 'attention_proj')

    def _gathered(self, params, name: str) -> Array:
        # Casting to bfloat16 before the gather halves the bytes to move.
        return self.layout.gather(params['kernel'].astype(self.dtype), _KERNEL_AXES[name])

    def _affine(self, x: Array, kernel: Array, bias: Array, output_dtype=None) -> Array:
        # Multiply plain matrices: XLA's CPU backend takes a slow path for the gradient of a product
        # with two token axes, and its TPU backend makes a copy for a separate head axis.
        leading, inputs = x.shape[:2], math.prod(x.shape[2:])
        x = x.reshape(-1, inputs).astype(self.dtype)
        # JAX's policies for products do not see those with a derivative of our own; names they see.
        y = checkpoint_name(
            product('ij,jk->ik', x, kernel.reshape(inputs, -1), self.precision), 'dots'
        )
        y = (y + bias.reshape(-1)).astype(output_dtype or self.dtype)
        return y.reshape(*leading, *bias.shape)


@dataclasses.dataclass(frozen=True)
class ChannelsFirst:
    """Activations [C, N, S] and kernels [*outputs, *inputs], as in decoding; see `prepare`."""

    axis: ClassVar[int] = 0

    dtype: DTypeLike
    layout: Any
    precision: str = 'highest'

    def prepare(self, params, name: str):
        """Transposes the kernel of a linear map, once, outside the loop over positions."""
        kernel = params['kernel'].astype(self.dtype)
        inputs = 2 if name == 'attention_proj' else 1
        axes = (*range(inputs, kernel.ndim), *range(inputs))
        return {'kernel': kernel.transpose(axes), 'bias': params['bias'][..., None, None]}

    def positions(self, h: Array) -> int:
        return h.shape[2]

    def constrain(self, h: Array, channels: str) -> Array:
        return self.layout.constrain(h, channels, 'batch', 'length')

    def normalize(self, h: Array, params) -> Array:
        return normalize(h, params, self.axis, self.dtype)

    def linear(self, params, x: Array, name: str, output_dtype: DTypeLike | None = None) -> Array:
        """Returns kernel @ x + bias over the leading axes of x; ignores `name`."""
        kernel, inputs = params['kernel'], 'ij'[: x.ndim - 2]
        outputs = 'abc'[: kernel.ndim - len(inputs)]
        subscripts = f'{outputs}{inputs},{inputs}ns->{outputs}ns'
        y = product(subscripts, kernel, x.astype(self.dtype), self.precision)
        return (y + params['bias']).astype(output_dtype or self.dtype)

    def qkv(self, params, x: Array, head_dim: int, whole: bool) -> Sequence[Array]:
        """Returns queries, keys and values, [N, H, S, K] each."""
        def heads(y):
            return jnp.einsum('...hkns->...nhsk', y)

        # On TPU one product is faster if it is small; splitting a large one costs a copy.
        if not whole:
            return heads(self.linear(params, x, 'qkv'))
        parts = [jax.tree.map(lambda a, i=i: a[i], params) for i in range(3)]
        return [heads(self.linear(part, x, 'qkv')) for part in parts]

    def attention_proj(self, params, x_NxHxSxK: Array) -> Array:
        return self.linear(params, x_NxHxSxK.transpose(1, 3, 0, 2), 'attention_proj')


def layer(
    form: 'ChannelsLast | ChannelsFirst',
    params,
    h: Array,
    *,
    head_dim: int,
    cache: LayerCache | None = None,
    start=0,
    temperature: Any = 1.0,
) -> tuple[Array, LayerCache | None]:
    """Applies a pre-norm Transformer layer: h += proj(attention(norm(h))), h += mlp(norm(h)).

    Args:
      form: where the channels of h are; `params` must have the same form.
      h: the residual stream at S positions, [N, S, C] or [C, N, S]. Its dtype is kept.
      cache: key/value cache, filled before `start`, with room for these S positions. If it is None
        or holds S positions only, the layer runs causal self-attention among them with the chip's
        attention kernel.
      start: index of the first of the S positions; may be traced.
      temperature: divides the attention logits; a number or [N, 1, 1, 1].
    Returns:
      h and the updated cache (None if it was None).
    """
    layout = form.layout
    whole = cache is None or cache.key.shape[2] == form.positions(h)
    x = form.normalize(h, params['attention_norm'])
    q, k, v = (
        layout.constrain(part, 'batch', 'heads', 'length', 'head_dim')
        for part in form.qkv(params['qkv'], x, head_dim, whole)
    )
    scale = head_dim**-0.5 / temperature
    if cache is not None and whole:
        cache = LayerCache(k.astype(cache.key.dtype), v.astype(cache.value.dtype))
    if cache is None or whole:
        x = layout.causal_attention(q, k, v, scale, form.precision)
    else:
        at = (0, 0, start, 0)
        cache = LayerCache(*(
            layout.constrain(
                jax.lax.dynamic_update_slice(old, new.astype(old.dtype), at),
                'batch', 'heads', 'length', 'head_dim',
            )
            for old, new in zip(cache, (k, v))
        ))
        mask = jnp.arange(cache.key.shape[2]) <= start + jnp.arange(q.shape[2])[:, None]
        x = attention(q, *cache, mask, scale, form.precision)
    x = layout.constrain(x, 'batch', 'heads', 'length', 'head_dim')
    h = form.constrain(h + form.attention_proj(params['attention_proj'], x), 'width')
    x = form.normalize(h, params['mlp_norm'])
    x = gelu(form.constrain(form.linear(params['mlp_in'], x, 'mlp_in'), 'hidden'))
    return form.constrain(h + form.linear(params['mlp_out'], x, 'mlp_out'), 'width'), cache


def normalize(x: Array, params, axis: int, dtype: DTypeLike) -> Array:
    """Applies layer normalization over an axis in float32, with epsilon 1e-5; casts to `dtype`."""
    wide = x.astype(at_least_float32(x.dtype))
    scale, bias = (
        jnp.expand_dims(params[name], [i for i in range(x.ndim) if i != axis])
        for name in ('scale', 'bias')
    )
    centred = wide - wide.mean(axis, keepdims=True)
    variance = jnp.square(centred).mean(axis, keepdims=True)
    return (centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias).astype(dtype)


def gelu(x: Array) -> Array:
    """Returns x * Phi(x), with the exact normal distribution function."""
    wide = x.astype(at_least_float32(x.dtype))
    return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)
