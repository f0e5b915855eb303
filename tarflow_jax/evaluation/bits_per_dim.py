"""Bits per dimension and the training loss over a whole set."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.data import pipeline
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.model import TarFlow
from tarflow_jax.training import sharding
from tarflow_jax.training.step import Recipe, add_noise


@functools.partial(jax.jit, static_argnums=(0, 1))
def scores(model: TarFlow, recipe: Recipe, variables, batch, key):
    """Per image: nats of the dequantised image, and the training loss in nats per dimension."""
    keys = jax.random.split(key)
    labels = batch['label']
    nats = likelihood.log_prob(
        model, variables, likelihood.dequantise(keys[0], batch['image']), labels
    )
    z, logdet = model.apply(variables, add_noise(keys[1], batch['image'], recipe), labels)
    each = lambda z, logdet: likelihood.training_loss(z[None], logdet[None])[0]  # noqa: E731
    return nats, jax.vmap(each)(z, logdet)


def bits_per_dim(
    model: TarFlow, variables, source, *, recipe: Recipe, mesh, batch_size, key, draws=1
) -> dict[str, float]:
    """Mean over the set of the bits per dimension of 8-bit pixels under uniform dequantisation.

    Every image is scored with its label, with `draws` draws of the noise. For flows trained with
    Gaussian noise the number is a valid bound and far from what the noise level allows; `loss` is
    what their training minimises, in nats per dimension, with fresh noise of the recipe.

    Returns:
      'bits_per_dim', its standard error over images, 'loss', and 'images'.
    """
    bits, losses = [], []
    rows = sharding.local_rows(mesh, batch_size)
    for draw in range(draws):
        batches = pipeline.eval_batches(source, batch_size=batch_size, rows=rows)
        for i, batch in enumerate(batches):
            batch = sharding.to_devices(batch, mesh, batch_size)
            mask = batch.pop('mask')
            key_i = jax.random.fold_in(jax.random.fold_in(key, draw), i)
            nats, loss = scores(model, recipe, variables, batch, key_i)
            nats, loss, mask = sharding.to_host((nats, loss, mask))
            mask = mask.astype(bool)
            nats = nats.astype(np.float64)[mask]
            bits.append(np.asarray(likelihood.bits_per_dim(nats, model.num_dims)))
            losses.append(loss.astype(np.float64)[mask])
    per_image = np.concatenate(bits).reshape(draws, -1).mean(0)
    return {
        'bits_per_dim': per_image.mean(),
        'bits_per_dim_standard_error': per_image.std(ddof=1) / np.sqrt(per_image.size),
        'loss': np.concatenate(losses).mean(),
        'images': per_image.size,
    }
