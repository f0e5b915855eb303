"""Classification with the flow's own likelihood: argmax over y of log p(x | y) (Bayes' rule)."""

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
def class_log_probs(model: TarFlow, recipe: Recipe, variables, pixels, key):
    """log p(x | y) of every class y for 8-bit images [B, H, W, C]: [B, num_classes], nats.

    The images get the noise of the training recipe, the same for every class.
    """
    images = add_noise(key, pixels, recipe)

    def given(label):
        labels = jnp.full(images.shape[0], label)
        return likelihood.log_prob(model, variables, images, labels)

    return jax.lax.map(given, jnp.arange(model.num_classes)).T


def classification(
    model: TarFlow, variables, source, *, recipe: Recipe, mesh, batch_size, key, draws=1
) -> dict[str, float]:
    """Accuracy of the Bayes classifier with equal class priors; log p is averaged over the draws."""
    correct = []
    rows = sharding.local_rows(mesh, batch_size)
    for i, batch in enumerate(pipeline.eval_batches(source, batch_size=batch_size, rows=rows)):
        batch = sharding.to_devices(batch, mesh, batch_size)
        mask, labels = sharding.to_host((batch['mask'], batch['label']))
        total = 0.0
        for draw in range(draws):
            key_i = jax.random.fold_in(jax.random.fold_in(key, draw), i)
            scores = class_log_probs(model, recipe, variables, batch['image'], key_i)
            total += sharding.to_host(scores)
        correct.append((total.argmax(1) == labels)[mask.astype(bool)])
    correct = np.concatenate(correct)
    return {'accuracy': correct.mean(), 'images': correct.size}
