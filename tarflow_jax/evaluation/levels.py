"""Bits per dimension of noisy images at chosen noise levels, for noise-conditioned flows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.evaluation.bits_per_dim import standard_error
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training.corruption import condition_of, to_unit_range
from tarflow_jax.training.over_set import over_set

MEANING = (
    'The curve shows the cost of a noisy image in bits per dimension. As the noise level grows, it '
    'approaches the entropy of the noise. The difference is an upper bound on the information '
    'about the image that survives the noise.'
)


@functools.partial(jax.jit, static_argnums=0)
def noisy_log_probs(
    model: TarFlow, variables, levels, batch, keys
) -> tuple[jax.Array, jax.Array]:
    """Computes log p of x + t eps at each level t, and log N(t eps; 0, t^2), in nats: [B, L].

    Each image has one eps, from its own key, for all levels.

    Args:
      levels: float32 [L].
      batch: a batch of a data source.
      keys: [B].
    """
    x = to_unit_range(batch['image'])
    noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)

    def at_level(level):
        condition = condition_of(model, batch, level)
        return likelihood.log_prob(model, variables, x + level * noise, condition)

    of_images = jax.lax.map(at_level, levels).T
    squares = jnp.square(noise).sum((1, 2, 3))[:, None]
    constants = 0.5 * model.num_dims * jnp.log(2 * math.pi * levels**2)
    return of_images, -0.5 * squares - constants


def bits_at_levels(
    model: TarFlow, variables, source, *, levels, mesh, batch_size, key, draws=1
) -> dict:
    """Computes bits per dimension of x + t eps at each noise level t over a dataset, in float32.

    All numbers are in bits per dimension of 8-bit pixels, like the score `bits_per_dim`. Those of
    the noise alone are its entropy, log2(t sqrt(2 pi e)) + 7. The difference,
    -log p(x + t eps) + log N(t eps; 0, t^2), has the mean I(x; x + t eps) if the flow is exact, and
    a larger mean otherwise. As t falls, it grows to the entropy of the images. It is averaged image
    by image, so that the randomness of eps nearly cancels.

    Args:
      levels: noise levels above 0.
      draws: number of samples of eps per image.
    Returns:
      'levels', and for each level 'bits_per_dim', 'noise_bits_per_dim' and the mean difference
      'image_bits_per_dim'; standard errors over the images of the first and the last of these;
      'images' and 'draws'.
    """
    model = model.clone(dtype=jnp.float32)
    levels = np.asarray(levels, np.float64)
    score = functools.partial(noisy_log_probs, model, variables, jnp.asarray(levels, jnp.float32))
    nats, noise_nats = over_set(
        score, source, mesh=mesh, batch_size=batch_size, key=key, draws=draws, what='levels'
    )
    nats, noise_nats = (x.astype(np.float64).mean(0) for x in (nats, noise_nats))
    bits = np.asarray(likelihood.bits_per_dim(nats, model.num_dims))
    entropy = 0.5 * np.log(2 * math.pi * math.e * levels**2)
    image_bits = (noise_nats - nats) / model.num_dims / math.log(2)
    found = {
        'bits_per_dim': bits.mean(0),
        'standard_error_over_images': [standard_error(x) for x in bits.T],
        'noise_bits_per_dim': (math.log(128) + entropy) / math.log(2),
        'image_bits_per_dim': image_bits.mean(0),
        'image_standard_error_over_images': [standard_error(x) for x in image_bits.T],
    }
    found = {name: np.asarray(values).tolist() for name, values in found.items()}
    return {'levels': levels.tolist()} | found | {'images': len(bits), 'draws': draws}


def rows(r: dict) -> list[tuple[str, str]]:
    """Returns the rows of the printed table, from the result of `bits_at_levels`."""
    columns = zip(
        r['levels'], r['bits_per_dim'], r['standard_error_over_images'], r['noise_bits_per_dim'],
        r['image_bits_per_dim'], r['image_standard_error_over_images'],
    )
    found = [
        (f'bits/dim at noise level {level:.3g}',
         f'{bits:.4f}  (standard error {error:.4f}); noise alone {noise:.4f}, difference '
         f'{image:.4f} ({image_error:.4f})')
        for level, bits, error, noise, image, image_error in columns
    ]
    return [*found, (
        'difference', 'an upper bound on the information that survives the noise  '
        f'({r["images"]} images, {r["draws"]} draws of the noise; float32)',
    )]
