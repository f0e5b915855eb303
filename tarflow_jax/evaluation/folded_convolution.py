"""Convolutions with the following batch norm folded in, and loading them from a torch file.

Batch norm with stored statistics is affine: gamma (x - mean) / sqrt(var + eps) + beta. Folded into
the preceding convolution (which has no bias), it scales the kernel of each output channel by
gamma / sqrt(var + eps) and gives the bias beta - mean gamma / sqrt(var + eps).
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.torch_file import read_torch_file


def convolution(
    x: jax.Array, features: int, size: tuple[int, int], name: str, *, strides=1, padding='SAME',
) -> jax.Array:
    """Applies a convolution named `name` in the calling module to x [B,H,W,C]."""
    # Full precision, because TPUs would multiply in bfloat16.
    return nn.Conv(
        features, size, strides, padding, precision=jax.lax.Precision.HIGHEST, name=name
    )(x)


def load(
    path, network: nn.Module, input_size: int, names: Callable[[str], tuple[str, str]],
    ignored: tuple[str, ...], eps: float,
) -> dict:
    """Loads the variables of a network of folded convolutions from a torch state dict.

    Args:
      path: a file written by `torch.save`.
      network: a network of float32 images [1, input_size, input_size, 3]; every layer has a kernel
        [height, width, in, out] and a bias [out].
      names: function from a layer to the torch names of its convolution and batch norm.
      ignored: prefixes of tensor names to ignore.
    Returns:
      float32 NumPy arrays, folded in float64.
    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if a tensor is missing, is unknown, or has a wrong shape or dtype.
    """
    tensors = dict(read_torch_file(path))
    images = jax.ShapeDtypeStruct((1, input_size, input_size, 3), jnp.float32)
    layers = jax.eval_shape(network.init, jax.random.key(0), images)['params']

    def take(name, shape):
        if name not in tensors:
            raise ValueError(f'{path} has no tensor {name!r}; {_expected(network)}.')
        array = tensors.pop(name)
        if array.shape != shape or array.dtype != np.float32:
            raise ValueError(
                f'{path}: its tensor {name!r} is {array.dtype} {array.shape} instead of float32 '
                f'{shape}; {_expected(network)}.'
            )
        return array.astype(np.float64)

    params = {}
    for layer, shapes in layers.items():
        convolution_name, norm_name = names(layer)
        height, width, inputs, outputs = shapes['kernel'].shape
        weight = take(f'{convolution_name}.weight', (outputs, inputs, height, width))
        gamma, beta, mean, variance = (
            take(f'{norm_name}.{part}', (outputs,))
            for part in ('weight', 'bias', 'running_mean', 'running_var')
        )
        scale = gamma / np.sqrt(variance + eps)
        params[layer] = {
            'kernel': (weight.transpose(2, 3, 1, 0) * scale).astype(np.float32),
            'bias': (beta - mean * scale).astype(np.float32),
        }
    unknown = [
        name for name in tensors
        if not name.startswith(ignored) and not name.endswith('.num_batches_tracked')
    ]
    if unknown:
        raise ValueError(
            f'{path} has the tensor {unknown[0]!r}, which the network does not have; '
            f'{_expected(network)}.'
        )
    return {'params': params}


def _expected(network: nn.Module) -> str:
    return f'pass the weights of {type(network).__name__}'
