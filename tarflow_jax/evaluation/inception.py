"""The Inception-v3 network of the Frechet Inception distance and its spatial variant sFID.

Every published FID uses one network, the frozen TensorFlow graph of 2015-12-05 of Heusel et al.
(arXiv 1706.08500). It differs from the Inception-v3 of current model zoos: it resizes images by
TensorFlow 1's bilinear rule, its average pooling does not count padding, and its last block has
max pooling instead of average pooling. This module is that graph up to its pooled features. Layer
names are those of the torch-fidelity port, whose weights `load_inception` reads.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.evaluation import folded_convolution

SIZE = 299
SPATIAL_CHANNELS = 7
_EPS = 1e-3  # epsilon of the batch norms


class InceptionV3(nn.Module):
    """Computes features of images from `prepare`; float32, folded batch norms, inference only."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        """Maps x [B,299,299,3] to 'pooled' [B,2048] and 'spatial' [B,2023].

        'spatial' has the features of sFID in the evaluator of Dhariwal & Nichol (arXiv 2105.05233):
        the first 7 channels of the 17x17 feature map mixed_6/conv (the 1x1 branch of Mixed_6d after
        its ReLU), flattened with the channels last.
        """
        x = _conv(x, 32, 3, 'Conv2d_1a_3x3', strides=2, padding='VALID')
        x = _conv(x, 32, 3, 'Conv2d_2a_3x3', padding='VALID')
        x = _conv(x, 64, 3, 'Conv2d_2b_3x3')
        x = _halve(x)
        x = _conv(x, 80, 1, 'Conv2d_3b_1x1')
        x = _conv(x, 192, 3, 'Conv2d_4a_3x3', padding='VALID')
        x = _halve(x)
        for name, pooled in (('Mixed_5b', 32), ('Mixed_5c', 64), ('Mixed_5d', 64)):
            x = _block_35(x, name, pooled)
        x = _to_17(x, 'Mixed_6a')
        for name, inner in (('6b', 128), ('6c', 160), ('6d', 160), ('6e', 192)):
            x = _block_17(x, f'Mixed_{name}', inner)
            if name == '6d':
                spatial = x[..., :SPATIAL_CHANNELS]
        x = _to_8(x, 'Mixed_7a')
        x = _block_8(x, 'Mixed_7b', _average)
        x = _block_8(x, 'Mixed_7c', functools.partial(_max, strides=1, padding='SAME'))
        return {'pooled': x.mean((1, 2)), 'spatial': spatial.reshape(len(x), -1)}


def _conv(x, features, size, name, **how):
    size = (size, size) if isinstance(size, int) else size
    return nn.relu(folded_convolution.convolution(x, features, size, name, **how))


def _max(x, strides, padding):
    return nn.max_pool(x, (3, 3), (strides, strides), padding)


_halve = functools.partial(_max, strides=2, padding='VALID')


def _average(x):
    return nn.avg_pool(x, (3, 3), padding='SAME', count_include_pad=False)


def _join(*branches):
    return jnp.concatenate(branches, -1)


def _chain(x, name, *convolutions):
    """Applies convolutions (features, size) in sequence, with names numbered from 1."""
    for number, (features, size) in enumerate(convolutions, 1):
        x = _conv(x, features, size, f'{name}_{number}')
    return x


def _block_35(x, name, pooled):
    one = _conv(x, 64, 1, f'{name}.branch1x1')
    five = _chain(x, f'{name}.branch5x5', (48, 1), (64, 5))
    three = _chain(x, f'{name}.branch3x3dbl', (64, 1), (96, 3), (96, 3))
    return _join(one, five, three, _conv(_average(x), pooled, 1, f'{name}.branch_pool'))


def _to_17(x, name):
    once = _conv(x, 384, 3, f'{name}.branch3x3', strides=2, padding='VALID')
    twice = _chain(x, f'{name}.branch3x3dbl', (64, 1), (96, 3))
    twice = _conv(twice, 96, 3, f'{name}.branch3x3dbl_3', strides=2, padding='VALID')
    return _join(once, twice, _halve(x))


def _block_17(x, name, inner):
    wide, high = (1, 7), (7, 1)
    one = _conv(x, 192, 1, f'{name}.branch1x1')
    once = _chain(x, f'{name}.branch7x7', (inner, 1), (inner, wide), (192, high))
    twice = _chain(
        x, f'{name}.branch7x7dbl', (inner, 1), (inner, high), (inner, wide), (inner, high),
        (192, wide),
    )
    return _join(one, once, twice, _conv(_average(x), 192, 1, f'{name}.branch_pool'))


def _to_8(x, name):
    three = _conv(x, 192, 1, f'{name}.branch3x3_1')
    three = _conv(three, 320, 3, f'{name}.branch3x3_2', strides=2, padding='VALID')
    seven = _chain(x, f'{name}.branch7x7x3', (192, 1), (192, (1, 7)), (192, (7, 1)))
    seven = _conv(seven, 192, 3, f'{name}.branch7x7x3_4', strides=2, padding='VALID')
    return _join(three, seven, _halve(x))


def _block_8(x, name, pool):
    one = _conv(x, 320, 1, f'{name}.branch1x1')
    once = _conv(x, 384, 1, f'{name}.branch3x3_1')
    once_wide = _conv(once, 384, (1, 3), f'{name}.branch3x3_2a')
    once_high = _conv(once, 384, (3, 1), f'{name}.branch3x3_2b')
    twice = _chain(x, f'{name}.branch3x3dbl', (448, 1), (384, 3))
    twice_wide = _conv(twice, 384, (1, 3), f'{name}.branch3x3dbl_3a')
    twice_high = _conv(twice, 384, (3, 1), f'{name}.branch3x3dbl_3b')
    pooled = _conv(pool(x), 192, 1, f'{name}.branch_pool')
    return _join(one, once_wide, once_high, twice_wide, twice_high, pooled)


def resize_like_tensorflow_1(images: jax.Array, size: int) -> jax.Array:
    """Resizes bilinearly by the rule of TensorFlow 1: float32 [B,H,W,C] to [B,size,size,C].

    Pixel i of the result is interpolated at i * old / new in the source, between the pixel there
    and its right (lower) neighbour; the last pixel is its own neighbour. Pixel centres are not
    aligned, and shrinking does not average skipped pixels.
    """
    for axis in (2, 1):
        old = images.shape[axis]
        place = np.arange(size, dtype=np.float32) * np.float32(old / size)
        low = place.astype(np.int32)
        high = np.minimum(low + 1, old - 1)
        share = (place - low).reshape([size] + [1] * (3 - axis))
        at_low, at_high = images.take(low, axis), images.take(high, axis)
        images = at_low + (at_high - at_low) * share
    return images


def prepare(images: jax.Array) -> jax.Array:
    """Converts images uint8 [B,H,W,3] of any size to the input, [B,299,299,3] in [-1, 1)."""
    return (resize_like_tensorflow_1(images.astype(jnp.float32), SIZE) - 128) / 128


def features(variables, images: jax.Array) -> dict[str, jax.Array]:
    """Computes 'pooled' [B,2048] and 'spatial' [B,2023], float32, of images uint8 [B,H,W,3]."""
    return InceptionV3().apply(variables, prepare(images))


def load_inception(path) -> dict:
    """Loads the variables of `InceptionV3` from the published weights of pytorch-fid.

    The file is pt_inception-2015-12-05-6726825d.pth; torch-fidelity publishes the same file with a
    name that starts with weights-inception. The classifier `fc` and auxiliary logits are left out.

    Raises:
      FileNotFoundError, ValueError: if the file is missing or belongs to another network.
    """
    return folded_convolution.load(
        path, InceptionV3(), SIZE, lambda layer: (f'{layer}.conv', f'{layer}.bn'),
        ignored=('fc.', 'AuxLogits.'), eps=_EPS,
    )
