"""The likelihood, shared by the loss, bits/dim, denoising and classification."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition, check_condition, labels_keyword
from tarflow_jax.flow.flow import Flow, Variables


def prior_variance(variables: Variables) -> Array | float:
    """Returns the variance of the Gaussian prior: [T, D] if volume-preserving, else 1."""
    return variables['prior']['variance'] if 'prior' in variables else 1.0


def latent_log_prob(z: Array, logdet: Array, variance: Array | float = 1.0) -> Array:
    """Computes the log density of examples from their latents (paper, eq. 1).

        log p(x) = sum(-z^2 / (2 variance) - log(2 pi variance) / 2) + logdet

    Args:
      z: [B, T, D].
      logdet: [B], in nats.
      variance: variance of the prior, broadcastable to [T, D].
    Returns:
      [B], nats per example.
    """
    variance = jnp.asarray(variance, z.dtype)
    terms = jnp.square(z) / variance + jnp.log(2 * math.pi * variance)
    return logdet - 0.5 * terms.sum((1, 2))


@labels_keyword
def log_prob(
    model: Flow, variables: Variables, examples: Array,
    condition: Condition | Array | None = None,
) -> Array:
    """Computes the exact log density of sequences [B, T, D] or images [B, H, W, C] in [-1, 1].

    For images this is the density on the [-1, 1] scale; `bits_per_dim` converts it to 8-bit pixels.

    Args:
      condition: None, labels int32 [B] (-1 for "no class"), or a `Condition`.
    Returns:
      [B], nats per example.
    Raises:
      ValueError: if examples or condition do not fit the model.
    """
    model.check_examples(examples)
    condition = check_condition(model, condition, jnp.shape(examples)[0])
    return _log_prob(model, variables, examples, condition)


@partial(jax.jit, static_argnums=0)
def _log_prob(model: Flow, variables, examples: Array, condition: Condition) -> Array:
    found: Any = model.apply(variables, examples, condition)
    z, logdet = found
    return latent_log_prob(z, logdet, prior_variance(variables))


def score(model: Flow, variables, examples: Array, condition: Condition) -> Array:
    """Returns the gradient of the log density with respect to the examples, in their shape."""
    return jax.grad(lambda x: _log_prob(model, variables, x, condition).sum())(examples)


def bits_per_dim(log_prob: Array, num_dims: int) -> Array:
    """Converts nats per image to bits per dimension of 8-bit images, x = 2 (v + u) / 256 - 1.

    A dequantized pixel value spans 1/128 on the [-1, 1] scale, hence the log 128.
    """
    return (math.log(128.0) - log_prob / num_dims) / math.log(2.0)


def example_losses(z: Array, logdet: Array) -> Array:
    """Returns the loss of each example, [B]: negative log density in nats per dimension.

    The constant of the Gaussian is left out. The prior has unit variance, for volume-preserving
    flows too (paper, section 4.5, and the official code).
    """
    return 0.5 * jnp.square(z).mean((1, 2)) - logdet / (z.shape[1] * z.shape[2])


def training_loss(
    z: Array, logdet: Array, weight: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Returns the mean of `example_losses` over the batch, and its two terms.

    Args:
      z: [B, T, D].
      logdet: [B], in nats.
      weight: weight of each example's loss, [B]; None for 1.
    Returns:
      (loss, {'prior': 0.5 mean(z^2), 'logdet': mean(logdet) / (T D)}), all scalars. The terms are
      not weighted.
    """
    losses = example_losses(z, logdet)
    loss = (losses if weight is None else weight * losses).mean()
    num_dims = z.shape[1] * z.shape[2]
    return loss, {'prior': 0.5 * jnp.square(z).mean(), 'logdet': logdet.mean() / num_dims}


def moved_prior_variance(variance_TxD: Array, z_BxTxD: Array, rate: float = 0.1) -> Array:
    """Moves a volume-preserving flow's prior variance by `rate` toward the batch mean of z^2."""
    return variance_TxD + rate * (jnp.square(z_BxTxD).mean(0) - variance_TxD)
