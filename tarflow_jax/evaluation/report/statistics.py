"""Measures what the report needs real images for: neighbours, likelihoods and the blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import likelihood
from tarflow_jax.flow.order import reorder, restore
from tarflow_jax.training.corruption import condition_of, corrupt
from tarflow_jax.training.over_set import batches, evenly_spaced, images_of, over_set
from tarflow_jax.training.validation import dequantized_log_prob

CHUNK = 256  # images compared at a time


def nearest(pixels, source, keep: int, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Finds the images of a source that are nearest to given pictures, pixel by pixel.

    Args:
      pixels: uint8 [S, H, W, C].
      mirrored: also compare with the mirror images of the source, as training with flips does.
    Returns:
      (indices, distances), both [S, keep], nearest first. A distance is the root mean square
      difference of the pixels, in grey levels (0 to 255).
    """
    wanted = pixels.reshape(len(pixels), -1).astype(np.float32) - 127.5
    flipped = pixels[:, :, ::-1].reshape(wanted.shape).astype(np.float32) - 127.5
    squares = []
    for start in range(0, len(source), CHUNK):
        rows = range(start, min(start + CHUNK, len(source)))
        there = images_of(source, rows)
        there = there.reshape(len(there), -1).astype(np.float32) - 127.5
        ours = [wanted, flipped] if mirrored else [wanted]
        both = [-2 * a @ there.T + np.square(there).sum(1) for a in ours]
        squares.append(np.minimum(*both) if mirrored else both[0])
    squares = np.concatenate(squares, 1) + np.square(wanted).sum(1, keepdims=True)
    order = np.argsort(squares, axis=1, kind='stable')[:, :keep]
    found = np.take_along_axis(squares, order, 1) / wanted.shape[1]
    return order, np.sqrt(np.maximum(found, 0))


def likelihoods(
    model, variables, source, *, key, mesh, batch_size, noise_std: float | None = None
) -> np.ndarray:
    """Returns the bits per dimension of each image of a source, as the score of that name: [N]."""
    model = model.clone(dtype=jnp.float32)
    nats = over_set(
        functools.partial(dequantized_log_prob, model, variables, noise_std=noise_std), source,
        mesh=mesh, batch_size=batch_size, key=key, what='likelihoods',
    )
    return np.asarray(likelihood.bits_per_dim(nats[0].astype(np.float64), model.num_dims))


def extremes(bits, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the most and the least likely images, most extreme first.

    No image is in both.
    """
    order = np.argsort(np.where(np.isfinite(bits), bits, np.inf), kind='stable')
    count = min(count, len(bits) // 2)
    return order[:count], order[::-1][:count]


def blocks(plan, variables, source, *, key, mesh, count: int) -> list[dict[str, float]]:
    """Measures each block on images of a source that have the noise of training.

    Returns:
      for each block, by index: 'mean_square' of its output, and 'smallest', 'mean' and 'largest'
      of its log-scales. These leave out the first position, which has no log-scale.
    """
    few = evenly_spaced(source, count)
    _, batch, mask = next(batches(few, mesh=mesh, batch_size=len(few), what='blocks'))
    images, noise_std, _ = jax.jit(corrupt, static_argnums=2)(key, batch['image'], plan.recipe)
    condition = condition_of(plan.model, batch, noise_std)
    x, found = plan.model.to_tokens(images), []
    for b in range(len(plan.model.layers_per_block)):
        x, numbers = _block(
            plan.model.block(b), variables['params'][f'block_{b}'], x, condition,
            plan.model.block_orders()[b], mask,
        )
        found.append({name: float(value) for name, value in numbers.items()})
    return found


@functools.partial(jax.jit, static_argnums=0)
def _block(block, params, x_BxTxD, condition, order, mask):
    """Runs one block forward; blocks of equal depth share one program."""
    x = reorder(x_BxTxD, order)
    affine = block.affine(params, x, condition, order)
    z, log_scale = affine.forward(x), affine.log_scale
    kept = mask[:, None, None]
    own = log_scale[:, block.length - block.calls :]
    numbers = {
        'mean_square': jnp.mean(jnp.square(z), where=kept),
        'smallest': jnp.min(own, where=kept, initial=jnp.inf),
        'mean': jnp.mean(own, where=kept),
        'largest': jnp.max(own, where=kept, initial=-jnp.inf),
    }
    return restore(z, order), numbers
