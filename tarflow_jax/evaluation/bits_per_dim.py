"""Bits per dimension and the training loss over a whole dataset."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training.corruption import Recipe
from tarflow_jax.training.over_set import over_set
from tarflow_jax.training.validation import dequantized_log_prob, training_losses


def bits_per_dim(
    model: TarFlow, variables, source, *, recipe: Recipe, mesh, batch_size, key, draws=1
) -> dict[str, float]:
    """Computes bits per dimension of 8-bit pixels with uniform dequantization, over a dataset.

    Every image is scored with its label, in float32 for every dtype of the flow, with `draws`
    samples of the dequantization noise u. Papers publish the mean of -log2 p(v + u) over images and
    samples; it is an upper bound on the bits of the 8-bit image. The bound from K samples together,
    -log2 of the mean of p(v + u_k), is tighter (Burda et al., arXiv 1509.00519, eq. 8; here with a
    uniform proposal), but not comparable with published numbers.

    For flows trained with Gaussian noise both bounds are valid, but loose. Their training minimizes
    `loss`, in nats per dimension, with fresh noise.

    Returns:
      'bits_per_dim' and its standard error over images; 'loss'; 'images' and 'draws'. With two or
      more draws also its standard error over draws, and 'importance_weighted_bits_per_dim' with its
      standard error over images.
    """
    model = model.clone(dtype=jnp.float32)
    over = functools.partial(over_set, source=source, mesh=mesh, batch_size=batch_size)
    bits_key, loss_key = jax.random.split(key)
    log_probs = functools.partial(
        dequantized_log_prob, model, variables, noise_std=recipe.scored_noise_std
    )
    nats = over(log_probs, key=bits_key, draws=draws, what='bits/dim').astype(np.float64)
    losses = over(
        functools.partial(training_losses, model, recipe, variables), key=loss_key, what='loss'
    ).astype(np.float64)
    bits = np.asarray(likelihood.bits_per_dim(nats, model.num_dims))
    found = {
        'bits_per_dim': bits.mean(),
        'standard_error_over_images': standard_error(bits.mean(0)),
        'images': bits.shape[1],
        'draws': draws,
        'loss': losses.mean(),
    }
    if draws > 1:
        together = np.logaddexp.reduce(nats, axis=0) - np.log(draws)
        tighter = np.asarray(likelihood.bits_per_dim(together, model.num_dims))
        found |= {
            'standard_error_over_draws': standard_error(bits.mean(1)),
            'importance_weighted_bits_per_dim': tighter.mean(),
            'importance_weighted_standard_error_over_images': standard_error(tighter),
        }
    return found


def standard_error(values: np.ndarray) -> float:
    """Returns the standard error of the mean of independent values [N]."""
    return values.std(ddof=1) / np.sqrt(values.size) if values.size > 1 else float('nan')
