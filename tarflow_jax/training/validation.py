"""Validation: likelihoods of images that training does not see, beside those of images it does.

The noise of an image depends on the seed and its place alone. So two validations of a run differ by
the parameters only, and held-out and training images can be compared.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training.corruption import Recipe, condition_of, corrupt_each, dequantize
from tarflow_jax.training.over_set import evenly_spaced, over_set

# Folded into the key of the seed; training splits that key, which folds in 0, 1 and 2.
_KEY = 1000
_NOISE = ('noise', 'noise_std', 'lowest_noise_std', 'levels', 'weight')


@functools.partial(jax.jit, static_argnums=0)
def dequantized_log_prob(model: TarFlow, variables, batch, keys, noise_std=None) -> jax.Array:
    """Computes log p of dequantized images, each under its own key: [B], nats per image.

    Args:
      batch: of a data source.
      keys: of the dequantization noise, [B].
      noise_std: noise level to condition on, for noise-conditioned flows.
    """
    images = jax.vmap(dequantize)(keys, batch['image'])
    condition = condition_of(model, batch, noise_std)
    return likelihood.log_prob(model, variables, images, condition)


@functools.partial(jax.jit, static_argnums=(0, 1))
def training_losses(model: TarFlow, recipe: Recipe, variables, batch, keys) -> jax.Array:
    """Computes the training loss of each image under the recipe's noise: [B], nats per dimension.

    No labels are dropped.

    Args:
      batch: of a data source.
      keys: of the noise, [B].
    """
    images, noise_std, weight = corrupt_each(keys, batch['image'], recipe)
    z, logdet = model.apply(variables, images, condition_of(model, batch, noise_std))
    losses = likelihood.example_losses(z, logdet)
    return losses if weight is None else weight * losses


def validate(
    model: TarFlow, recipe: Recipe, variables, held_out, train, *, images: int, seed: int, mesh,
    batch_size: int,
) -> dict[str, float]:
    """Scores a fixed part of the held-out images and as many training images.

    Both parts are spread evenly over their sets, and image k of one has the noise of image k of the
    other. Computes in float32 whatever the flow's dtype, as `evaluation.bits_per_dim` does, and
    with the same programs.

    Args:
      variables: on the devices of the mesh.
      held_out: source of images that training does not see; train: the training set.
      images: how many of each, if both sets have as many.
      batch_size: see `over_set`.
    Returns:
      'validation/loss', the mean of `training_losses`, and 'validation/bits_per_dim'; the same of
      the training images as 'validation/train_loss' and 'validation/train_bits_per_dim'.
    """
    model = model.clone(dtype=jnp.float32)
    key = jax.random.fold_in(jax.random.key(seed), _KEY)
    count = _count(images, held_out, train)

    def score(batch, keys):
        return {
            'loss': training_losses(model, recipe, variables, batch, keys),
            'nats': dequantized_log_prob(
                model, variables, batch, keys, noise_std=recipe.scored_noise_std
            ),
        }

    found = {}
    for prefix, source in (('', held_out), ('train_', train)):
        few = evenly_spaced(source, count)
        scores = over_set(score, few, mesh=mesh, batch_size=batch_size, key=key)
        mean = {name: values[0].astype(np.float64).mean() for name, values in scores.items()}
        bits = likelihood.bits_per_dim(mean['nats'], model.num_dims)
        found[f'validation/{prefix}loss'] = float(mean['loss'])
        found[f'validation/{prefix}bits_per_dim'] = float(bits)
    return found


def described(recipe: Recipe, held_out, train, *, images: int, seed: int) -> dict:
    """Returns all that the numbers of `validate` depend on beside the parameters, as JSON values.

    Losses can be compared where this is equal.
    """
    about = held_out.about
    return {
        'dataset': about.get('dataset'), 'split': about.get('split'),
        'images': _count(images, held_out, train), 'of': len(held_out), 'seed': seed,
        **{name: getattr(recipe, name) for name in _NOISE},
    }


def _count(images: int, held_out, train) -> int:
    return min(images, len(held_out), len(train))
