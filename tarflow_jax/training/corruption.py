"""Adds the noise of training to 8-bit images, with its level and the weight of the loss."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow.condition import Condition
from tarflow_jax.flow.flow import Flow

Array = jax.Array


class Corrupted(NamedTuple):
    """A batch with noise.

    Args:
      images: float32 [B, H, W, C].
      noise_std: level of each image for noise-conditioned flows, [B]; else None.
      weight: weight of each image's loss, [B]; None is 1.
    """

    images: Array
    noise_std: Array | None = None
    weight: Array | None = None


def _gaussian(key: Array, pixels: Array, recipe) -> Corrupted:
    return Corrupted(_with_noise(key, pixels, recipe.noise_std))


def _uniform(key: Array, pixels: Array, recipe) -> Corrupted:
    return Corrupted(dequantize(key, pixels))


def _levels(key: Array, pixels: Array, recipe) -> Corrupted:
    level_key, noise_key = jax.random.split(key)
    low, high = recipe.lowest_noise_std, recipe.noise_std
    level = LEVELS[recipe.levels](level_key, pixels.shape[:1], low, high)
    images = _with_noise(noise_key, pixels, level.reshape(-1, *[1] * (pixels.ndim - 1)))
    return Corrupted(images, level, WEIGHTS[recipe.weight](level, low, high))


def _with_noise(key: Array, pixels: Array, noise_std) -> Array:
    images = to_unit_range(pixels)
    return images + noise_std * jax.random.normal(key, images.shape, images.dtype)


# The choices of `Recipe.noise`.
NOISES = {'gaussian': _gaussian, 'uniform': _uniform, 'levels': _levels}
# The choices of `Recipe.levels`: functions of (key, shape, lowest, highest) that draw levels.
LEVELS = {
    'uniform': lambda key, shape, low, high: jax.random.uniform(
        key, shape, minval=low, maxval=high
    ),
    'uniform_square': lambda key, shape, low, high: jnp.sqrt(
        jax.random.uniform(key, shape, minval=low**2, maxval=high**2)
    ),
    'log_normal': lambda key, shape, low, high: jnp.exp(jax.random.normal(key, shape) - 1.2),
}
# The choices of `Recipe.weight`: the weight of the loss as a function of (level, lowest, highest).
WEIGHTS = {
    'one': lambda t, low, high: jnp.ones_like(t),
    'level': lambda t, low, high: t,
    'level_normalized': lambda t, low, high: t / (low + high),
    'square': lambda t, low, high: t**2,
    'square_normalized': lambda t, low, high: t**2 / (low**2 + high**2),
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the train step does to a batch.

    Args:
      noise: 'gaussian' adds noise_std * N(0, 1) to images in [-1, 1] (generation); 'uniform'
        dequantizes (likelihood); 'levels' draws a noise level for each image, for
        noise-conditioned flows (iTARFlow).
      noise_std: standard deviation of 'gaussian', or the highest of the 'levels'.
      lowest_noise_std: the lowest of the 'levels'.
      levels: distribution of the levels, one of LEVELS: 'uniform' in the level, 'uniform_square'
        in its square, or 'log_normal', exp(N(-1.2, 1)), which ignores the bounds.
      weight: weight of an image's loss as a function of its level, one of WEIGHTS.
      label_dropout: probability of dropping an image's label and features.
      ema_decay: decay of the moving average of the parameters; 0 keeps no average.
      accumulation: number of equal parts of the batch, whose gradients are averaged.

    Raises:
      ValueError: if a field has another value.
    """

    noise: str = 'gaussian'
    noise_std: float = 0.05
    lowest_noise_std: float = 0.01
    levels: str = 'uniform'
    weight: str = 'level'
    label_dropout: float = 0.1
    ema_decay: float = 0.9999
    accumulation: int = 1

    def __post_init__(self):
        for field, choices in (('noise', NOISES), ('levels', LEVELS), ('weight', WEIGHTS)):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f'{field} {getattr(self, field)!r} is none of {", ".join(choices)}.'
                )
        for field in ('noise_std', 'label_dropout', 'ema_decay'):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise ValueError(f'{field} {value} must be at least 0 and below 1.')
        if self.noise == 'levels' and not 0 < self.lowest_noise_std < self.noise_std:
            raise ValueError(
                f'lowest_noise_std {self.lowest_noise_std} must be above 0 and below noise_std '
                f'{self.noise_std}.'
            )
        if self.accumulation < 1:
            raise ValueError(f'accumulation {self.accumulation} must be at least 1.')

    @property
    def gaussian_noise_std(self) -> float:
        """Standard deviation of the noise in samples, to be removed; 0 for uniform noise."""
        return 0.0 if self.noise == 'uniform' else self.noise_std

    @property
    def scored_noise_std(self) -> float | None:
        """Noise level for the likelihoods of noise-conditioned flows; None for other flows."""
        return self.lowest_noise_std if self.noise == 'levels' else None


def corrupt(key: Array, pixels: Array, recipe: Recipe) -> Corrupted:
    """Adds the recipe's noise to 8-bit images [B, H, W, C]."""
    return NOISES[recipe.noise](key, pixels, recipe)


def corrupt_each(keys: Array, pixels: Array, recipe: Recipe) -> Corrupted:
    """Adds the recipe's noise, the noise of each image from its own key: `keys` is [B]."""
    found = jax.vmap(lambda key, one: corrupt(key, one[None], recipe))(keys, pixels)
    return jax.tree.map(lambda x: x[:, 0], found)


def condition_of(model: Flow, batch: dict, noise_std=None) -> Condition:
    """Makes a flow's condition from a batch of a data source; leaves out what the flow ignores.

    Args:
      batch: 'label' int32 [B], and 'features' float32 [B, F] if the source has them.
      noise_std: noise levels for noise-conditioned flows, [B] or a scalar.
    """
    return Condition(
        labels=batch['label'] if model.num_classes else None,
        noise_std=noise_std if model.noise_conditioned else None,
        features=batch['features'] if model.num_features else None,
    )


def to_unit_range(pixels: Array) -> Array:
    """Maps 8-bit pixels 0..255 to float32 in [-1, 1], both ends included; for generation."""
    return pixels.astype(jnp.float32) * (2.0 / 255.0) - 1.0


def dequantize(key: Array, pixels: Array) -> Array:
    """Maps 8-bit pixels v to 2 (v + u) / 256 - 1, with u uniform in [0, 1); for likelihoods."""
    u = jax.random.uniform(key, pixels.shape, jnp.float32)
    return (pixels.astype(jnp.float32) + u) * (2.0 / 256.0) - 1.0
