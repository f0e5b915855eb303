"""The feature networks of the Frechet distance."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from tarflow_jax import paths
from tarflow_jax.evaluation import efficientnet, inception

INCEPTION_FILE = 'pt_inception-2015-12-05-6726825d.pth'
# First digits of the SHA-256 of the published files, which are also in their names.
_INCEPTION_SHA256 = '6726825d'
_EFFICIENTNET_SHA256 = '57934424'


@dataclasses.dataclass(frozen=True)
class FeatureNetwork:
    """A feature network with its weights.

    Attributes:
      about: JSON dict: 'name', which identifies the network in files of statistics, 'file',
        'sha256' of the weights, 'feature_size', 'preprocessing' in words, and
        'published_weights', whether published numbers use this file.
      is_fid: whether the distance between its pooled features is called FID.
      variables: NumPy arrays; `jax.device_put` them to all devices of a mesh once.
      features: function of (variables, images uint8 [B,H,W,1 or 3] of any size) that returns
        {'pooled': float32 [B,D]}, and for Inception also 'spatial', float32 [B,2023]. It is pure,
        for the caller to compile, and the same function for all networks of one name, so that
        `jax.jit` compiles it once. Images are independent, so B can be sharded. It raises
        ValueError for other images.
    """

    about: dict
    is_fid: bool
    variables: dict
    features: Callable[[dict, jax.Array], dict[str, jax.Array]]

    @property
    def name(self) -> str:
        return self.about['name']


def load(name: str, path: str = '') -> FeatureNetwork:
    """Loads the network 'inception', 'efficientnet_lite0' or 'auto' with the weights in `path`.

    'auto' is 'inception' if there is a path, else 'efficientnet_lite0'. Without a path,
    'efficientnet_lite0' uses the weights of the installed package. 'inception' needs a path.

    Raises:
      FileNotFoundError: if the file or the package is missing.
      ValueError: if the name is unknown, 'inception' has no path, or the file does not have the
        weights of the network.
    """
    if name == 'auto':
        name = 'inception' if path else 'efficientnet_lite0'
    if name == 'inception':
        if not path:
            raise ValueError(
                f'The feature network inception needs the path of its weights; download '
                f'{INCEPTION_FILE} from the releases of pytorch-fid (torch-fidelity has the same '
                f'file as {INCEPTION_FILE.replace("pt_", "weights-")}).'
            )
        path = paths.local_copy(path)
        variables = inception.load_inception(path)  # raises for a wrong path
        about = _about(
            'inception-v3-compat', path, _INCEPTION_SHA256, 2048,
            'bilinear to 299x299 by the rule of TensorFlow 1 (neither aligned corners nor pixel '
            'centres), then (v - 128) / 128',
        )
        return FeatureNetwork(about, True, variables, inception_features)
    if name == 'efficientnet_lite0':
        path = paths.local_copy(path or efficientnet.installed_weights())
        variables = efficientnet.load_efficientnet_lite0(path)
        about = _about(
            'efficientnet-lite0', path, _EFFICIENTNET_SHA256, 1280,
            'bilinear to 224x224 (pixel centres, antialiased), then (v - 127) / 128',
        )
        return FeatureNetwork(about, False, variables, efficientnet_lite0_features)
    raise ValueError(
        f"The feature network is {name!r}; choose 'auto', 'inception' or 'efficientnet_lite0'."
    )


def _about(name: str, path, published: str, feature_size: int, preprocessing: str) -> dict:
    with open(path, 'rb') as file:
        sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
    return {
        'name': name,
        'file': Path(path).name,
        'sha256': sha256,
        'published_weights': sha256.startswith(published),
        'feature_size': feature_size,
        'preprocessing': preprocessing,
    }


def inception_features(variables, images: jax.Array) -> dict[str, jax.Array]:
    return inception.features(variables, _in_colour(images))


def efficientnet_lite0_features(variables, images: jax.Array) -> dict[str, jax.Array]:
    return efficientnet.features(variables, _in_colour(images))


def _in_colour(images: jax.Array) -> jax.Array:
    shape = images.shape
    if images.dtype != jnp.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
        raise ValueError(
            f'The images are {images.dtype} {shape}, but feature networks take uint8 [B, H, W, 3], '
            'or [B, H, W, 1] for grey images.'
        )
    return jnp.repeat(images, 3, axis=-1) if shape[-1] == 1 else images
