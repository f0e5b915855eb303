"""The log density of each image of a set, as a table."""

import csv
import dataclasses
import functools
import io
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.evaluation.over_set import over_set
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training.corruption import Recipe, condition_of, corrupt_each

COLUMNS = ('file', 'log_prob', 'bits_per_dim', 'label', 'class')


def asked(recipe: Recipe) -> Recipe:
    """The noise that images are asked with: that of training, at the lowest of several levels."""
    if recipe.noise != 'levels':
        return recipe
    return dataclasses.replace(recipe, noise='gaussian', noise_std=recipe.lowest_noise_std)


def described(recipe: Recipe) -> str:
    """The noise in words."""
    noise = asked(recipe)
    if noise.noise == 'uniform':
        return 'uniform noise of one 8-bit step (dequantization)'
    return f'Gaussian noise of standard deviation {noise.noise_std:g}'


@functools.partial(jax.jit, static_argnums=(0, 1))
def noisy_log_prob(model: TarFlow, recipe: Recipe, variables, batch, keys) -> jax.Array:
    """Nats of each image [B] of a batch of a data source, with the noise of its key."""
    images = corrupt_each(keys, batch['image'], asked(recipe)).images
    condition = condition_of(model, batch, recipe.scored_noise_std)
    return likelihood.log_prob(model, variables, images, condition)


def log_probs(
    model: TarFlow, variables, source, *, recipe: Recipe, mesh, batch_size, key, draws=1
) -> np.ndarray:
    """Nats of each image of a source under its label, the mean over draws of the noise: [N].

    In float32 whatever the flow's dtype. Images have the noise that the flow was trained with:
    without it, or with another, they are unlike anything that it knows.
    """
    model = model.clone(dtype=jnp.float32)
    score = functools.partial(noisy_log_prob, model, recipe, variables)
    nats = over_set(
        score, source, mesh=mesh, batch_size=batch_size, key=key, draws=draws, what='likelihoods'
    )
    return nats.astype(np.float64).mean(0)


def table(
    names: Sequence[str], labels: Sequence[int], nats: np.ndarray, num_dims: int,
    class_names: Sequence[str] | None,
) -> str:
    """A CSV of COLUMNS; label -1 is "no class"."""
    bits = np.asarray(likelihood.bits_per_dim(nats, num_dims))
    text = io.StringIO()
    rows = csv.writer(text, lineterminator='\n')
    rows.writerow(COLUMNS)
    for name, log_prob, per_dim, label in zip(names, nats, bits, labels):
        known = class_names[label] if class_names is not None and label >= 0 else ''
        rows.writerow((name, f'{log_prob:.4f}', f'{per_dim:.6f}', int(label), known))
    return text.getvalue()
