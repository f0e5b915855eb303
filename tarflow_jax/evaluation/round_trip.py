"""The round trip: measures how exactly a checkpoint inverts itself, and if bfloat16 is sufficient.

In exact arithmetic, forward and inverse cancel. In floating point, each block multiplies the
rounding errors of earlier blocks by exp(a). A flow with large log-scales may lose all digits or
overflow, even in one direction only. The forward pass processes all positions at once, and the
inverse one position at a time with the key/value cache, so this test also compares the two.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.sampling.noise import standard_noise
from tarflow_jax.sampling.sample import sample

DTYPES = ('float32', 'bfloat16')
# A checkpoint passes if rounding errors are negligible: below half an 8-bit grey level in the root
# mean square, below a hundredth of a bit per dimension, and without non-finite samples.
IMAGE_LIMIT = 1 / 255
BITS_LIMIT = 0.01


def round_trip(
    model: TarFlow,
    variables,
    images,
    condition,
    *,
    key,
    guidance: Guidance | None = None,
    dtypes: tuple[str, ...] = DTYPES,
) -> dict:
    """Measures the errors of image -> z -> image and z -> image -> z, in total and per block.

    Args:
      images: float32 [B, H, W, C] in [-1, 1] with the training noise, sharded over the mesh. They
        determine the size of the activations.
      condition: None, labels or a `Condition`.
      key: random key of the latents [B, T, D], standard normal times the prior's deviation.
      guidance: guidance of the samples for 'guided_not_finite'; None leaves these out.
    Returns:
      'images', and for each dtype:

      'image_z_image', 'z_image_z': {'max', 'rms', 'not_finite'}. The errors are over all pixels of
        the images that stay finite (images in [-1, 1]; z with standard deviation 1 or that of the
        prior); 'not_finite' is the fraction of images that do not.
      'blocks': the same for each block alone. image_z_image inverts the output of the block;
        z_image_z applies the block to its own inverse.
      'logdet_sum': the largest |forward + inverse| log-determinant, in bits per dimension.
      'bits_per_dim_error': the largest difference of an image's bits per dimension from float32.
      'not_finite', 'guided_not_finite': fractions of the samples, without sampling again.

      'trusted' has for each dtype whether it passes for 'sampling' and for 'likelihood'.
    """
    noise = standard_noise(model, key, images.shape[0])
    noise_deviation = jnp.sqrt(likelihood.prior_variance(variables))
    found = {}
    exact = None
    for dtype in dtypes:
        cast = model.clone(dtype=jnp.dtype(dtype))
        there, back = _forward(cast, variables, images, condition)
        bits = likelihood.bits_per_dim(
            likelihood.latent_log_prob(there[-1], back, likelihood.prior_variance(variables)),
            model.num_dims,
        )
        exact = bits if exact is None else exact
        measured = _image_z_image(cast, variables, there, back, condition)
        measured |= _z_image_z(cast, variables, noise * noise_deviation, condition)
        measured['blocks'] = [
            {'image_z_image': a, 'z_image_z': b}
            for a, b in zip(measured.pop('image_blocks'), measured.pop('z_blocks'))
        ]
        measured['bits_per_dim_error'] = _largest(bits - exact)
        if guidance is not None and guidance.weight:
            drawn = sample(cast, variables, noise, condition, guidance=guidance)
            measured['guided_not_finite'] = _not_finite(drawn)
        found[dtype] = measured
    found = jax.tree.map(float, found)
    trusted = {dtype: _trusted(found[dtype]) for dtype in dtypes}
    return {'images': images.shape[0], **found, 'trusted': trusted}


def _trusted(measured: dict) -> dict[str, bool]:
    whole = measured['image_z_image']
    failed = measured['not_finite'] + measured.get('guided_not_finite', 0) + whole['not_finite']
    off = max(measured['bits_per_dim_error'], measured['logdet_sum'])
    return {
        'sampling': failed == 0 and whole['rms'] <= IMAGE_LIMIT,
        'likelihood': off <= BITS_LIMIT,
    }


def _image_z_image(model, variables, sequences, logdet, condition) -> dict:
    """Inverts a forward pass and returns the errors.

    `sequences` are the patches and the output of each block.
    """
    x, total, blocks = sequences[-1], logdet, []
    for b in reversed(range(len(model.layers_per_block))):
        alone, _ = _inverse(model, variables, b, sequences[b + 1], condition)
        blocks.insert(0, _error(alone, sequences[b]))
        x, inverse_logdet = _inverse(model, variables, b, x, condition)
        total = total + inverse_logdet
    nats_to_bits = 1 / (model.num_dims * np.log(2))
    return {
        'image_z_image': _error(x, sequences[0]),
        'image_blocks': blocks,
        'logdet_sum': _largest(total) * nats_to_bits,
    }


def _z_image_z(model, variables, z, condition) -> dict:
    x, blocks = z, []
    for b in reversed(range(len(model.layers_per_block))):
        before = x
        x, _ = _inverse(model, variables, b, x, condition)
        block, params, order = _block(model, variables, b)
        again = _block_forward(block, params, x, condition, order)
        blocks.insert(0, _error(again, before))
    images = model.from_tokens(x)
    sequences, _ = _forward(model, variables, images, condition)
    return {
        'z_image_z': _error(sequences[-1], z), 'z_blocks': blocks, 'not_finite': _not_finite(images)
    }


@functools.partial(jax.jit, static_argnums=0)
def _forward(model, variables, images, condition):
    """Returns the patches and the output of each block, and the log-determinant [B]."""
    sequences, logdet = model.apply(variables, images, condition, method='trajectory')
    return [model.to_tokens(images), *sequences], logdet


def _block(model, variables, index):
    """Returns the first arguments of both directions of a block, and its order."""
    return model.block(index), variables['params'][f'block_{index}'], model.block_orders()[index]


def _inverse(model, variables, index, z, condition):
    block, params, order = _block(model, variables, index)
    return block.inverse(params, z, condition, order)


@functools.partial(jax.jit, static_argnums=0)
def _block_forward(block, params, x_BxTxD, condition, order):
    """Applies one block to x; as in sampling, blocks of one depth share a program."""
    return block.forward(params, x_BxTxD, condition, order)[0]


@jax.jit
def _error(found, wanted) -> dict[str, jax.Array]:
    """Returns errors of the finite images and the fraction of others; both arrays are [B, ...]."""
    difference = (found - wanted).reshape(found.shape[0], -1)
    finite = jnp.isfinite(difference).all(1)
    # XLA's maximum on a CPU ignores NaN.
    difference = jnp.where(finite[:, None], difference, 0.0)
    square = jnp.square(difference).mean(1).sum() / jnp.maximum(finite.sum(), 1)
    return {
        'max': abs(difference).max(), 'rms': jnp.sqrt(square), 'not_finite': _share_not(finite)
    }


def _largest(difference) -> float:
    """Returns the largest absolute value; infinity if any is not finite."""
    return float(jnp.where(jnp.isfinite(difference), abs(difference), jnp.inf).max())


def _not_finite(images) -> float:
    return float(_share_not(jnp.isfinite(images).all((1, 2, 3))))


def _share_not(good) -> jax.Array:
    # Count integers: 1 - mean() can be nonzero if all are good.
    return (~good).sum() / good.size


def rows(r: dict) -> list[tuple[str, str]]:
    """Returns the rows of the printed table, from the result of `round_trip`."""
    lines = [('round trip', f'of {r["images"]} images: largest error (root mean square)')]
    for dtype, passed in r['trusted'].items():
        found = r[dtype]
        ways = ('image_z_image', 'z_image_z')
        named = [(dtype, found)]
        named += [(f'{dtype}, block {b} alone', block) for b, block in enumerate(found['blocks'])]
        for name, errors in named:
            there, back = (_as_text(errors[way]) for way in ways)
            lines.append((name, f'image -> z -> image {there}, z -> image -> z {back}'))
        finite = f'not finite {found["not_finite"]:.2%} of samples'
        if 'guided_not_finite' in found:
            finite += f', {found["guided_not_finite"]:.2%} of guided ones'
        lines.append((
            f'{dtype}, log-determinant',
            f'forward + inverse {found["logdet_sum"]:.1e} bits/dim at most; differs from float32 '
            f'by {found["bits_per_dim_error"]:.1e} bits/dim at most; {finite}',
        ))
        verdict = ', '.join(f'{use} {"yes" if good else "NO"}' for use, good in passed.items())
        lines.append((f'{dtype} can be trusted for', verdict))
    return lines


def _as_text(error: dict) -> str:
    share = f', {error["not_finite"]:.1%} not finite' if error['not_finite'] else ''
    return f'{error["max"]:.1e} ({error["rms"]:.1e}){share}'
