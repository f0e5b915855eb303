"""The likelihood, written once: loss, bits/dim, denoising and classification all come from here."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.model import TarFlow, Variables, check_labels


def prior_variance(variables: Variables) -> Array | float:
    """Variance of the Gaussian prior: `prior/variance` [T, D] if volume-preserving, else 1."""
    return variables['prior']['variance'] if 'prior' in variables else 1.0


def latent_log_prob(z: Array, logdet: Array, variance: Array | float = 1.0) -> Array:
    """Log density of images from their latents, by change of variables (paper eq. 1).

        log p(x) = sum(-z^2 / (2 variance) - log(2 pi variance) / 2) + logdet

    Args:
      z: [B, T, D]; logdet: [B], nats; variance: of the prior, broadcastable to [T, D].
    Returns:
      [B], nats per image.
    """
    variance = jnp.asarray(variance, z.dtype)
    terms = jnp.square(z) / variance + jnp.log(2 * math.pi * variance)
    return logdet - 0.5 * terms.sum((1, 2))


def log_prob(
    model: TarFlow, variables: Variables, images: Array, labels: Array | None = None
) -> Array:
    """Exact log density of images [B, H, W, C] in [-1, 1]: [B], nats per image.

    Labels are int32 [B], -1 for none, or None. The density is with respect to the [-1, 1] scale;
    `bits_per_dim` converts it to that of 8-bit pixels.

    Raises:
      ValueError: if images or labels do not fit the model.
    """
    check_labels(model.num_classes, labels, images.shape[0])
    return _log_prob(model, variables, images, labels)


@partial(jax.jit, static_argnums=0)
def _log_prob(model: TarFlow, variables, images: Array, labels: Array | None) -> Array:
    found: Any = model.apply(variables, images, labels)
    z, logdet = found
    return latent_log_prob(z, logdet, prior_variance(variables))


def bits_per_dim(log_prob: Array, num_dims: int) -> Array:
    """Bits per dimension of 8-bit images from nats per image, for x = 2 (v + u) / 256 - 1.

    A dequantised pixel value spans 1/128 of the [-1, 1] scale, hence the log 128.
    """
    return (math.log(128.0) - log_prob / num_dims) / math.log(2.0)


def training_loss(z: Array, logdet: Array) -> tuple[Array, dict[str, Array]]:
    """Negative log density under the unit prior, without its constant, and the two terms of it.

    Nats per dimension, averaged over the batch: 0.5 mean(z^2) - mean(logdet) / (T D). It keeps the
    unit variance for volume-preserving flows too (paper section 4.5, the official code).

    Returns:
      (loss, {'prior': 0.5 mean(z^2), 'logdet': mean(logdet) / (T D)}), all scalars.
    """
    num_dims = z.shape[1] * z.shape[2]
    constant = 0.5 * math.log(2 * math.pi)
    loss = -latent_log_prob(z, logdet).mean() / num_dims - constant
    return loss, {'prior': 0.5 * jnp.square(z).mean(), 'logdet': logdet.mean() / num_dims}


def moved_prior_variance(variance_TxD: Array, z_BxTxD: Array, rate: float = 0.1) -> Array:
    """Prior variance of a volume-preserving flow, moved by `rate` toward the batch mean of z^2."""
    return variance_TxD + rate * (jnp.square(z_BxTxD).mean(0) - variance_TxD)


def to_unit_range(pixels: Array) -> Array:
    """8-bit pixels 0..255 to float32 in [-1, 1], ends included (the scale of generation models)."""
    return pixels.astype(jnp.float32) * (2.0 / 255.0) - 1.0


def dequantise(key: Array, pixels: Array) -> Array:
    """8-bit pixels v to 2 (v + u) / 256 - 1 with u uniform in [0, 1): the scale of likelihoods."""
    u = jax.random.uniform(key, pixels.shape, jnp.float32)
    return (pixels.astype(jnp.float32) + u) * (2.0 / 256.0) - 1.0


def add_gaussian_noise(key: Array, images: Array, noise_std: float) -> Array:
    """Images + noise_std * standard normal noise (paper section 3.2)."""
    return images + noise_std * jax.random.normal(key, images.shape, images.dtype)


def denoise(
    model: TarFlow,
    variables: Variables,
    images: Array,
    labels: Array | None = None,
    *,
    noise_std: float,
    strength: float = 1.0,
) -> Array:
    """One step of score-based denoising (Tweedie; paper section 3.3, eq. 9).

        x + strength * noise_std^2 * d/dx log p(x)

    Args:
      images: [B, H, W, C], samples of a flow trained with Gaussian noise of `noise_std`.
      labels: those the samples were drawn with.
      strength: 1 is the theoretical optimum.
    Returns:
      images [B, H, W, C].
    """
    check_labels(model.num_classes, labels, images.shape[0])
    return _denoise(model, variables, images, labels, strength * noise_std**2)


@partial(jax.jit, static_argnums=0)
def _denoise(model: TarFlow, variables, images: Array, labels: Array | None, step) -> Array:
    def total(x):
        return _log_prob(model, variables, x, labels).sum()

    return images + step * jax.grad(total)(images)
