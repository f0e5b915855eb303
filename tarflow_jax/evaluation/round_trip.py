"""The certificate: how exactly a checkpoint inverts itself, and whether bfloat16 can be trusted.

On paper forward and inverse cancel. In floating point each block multiplies the rounding errors of
those before it by exp(a), and a flow with large log-scales may lose all its digits, or overflow,
in one direction and not in the other. The forward pass sees all positions at once and the inverse
one after another through the key/value cache, so that this also compares the two.
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
# A checkpoint passes where rounding stays below what anyone looks at: half a grey level of 8 bits
# in the root mean square, a hundredth of a bit per dimension, and no sample that is not finite.
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
    """The errors of image -> z -> image and z -> image -> z, whole and block by block.

    Args:
      images: float32 [B, H, W, C] in [-1, 1] with the noise of training, split over the mesh; they
        decide how large the numbers inside the flow are.
      condition: None, labels or a `Condition`.
      key: of the latents [B, T, D] to begin from, standard normal times the prior's deviation.
      guidance: that of the samples counted under 'guided_not_finite'; None leaves them out.
    Returns:
      'images', and for each dtype: 'image_z_image' and 'z_image_z' {'max', 'rms', 'not_finite'}
      over all pixels of the images that stay finite (images in [-1, 1]; z of standard deviation 1
      or the prior's) and the share of those that do not, the same of each of 'blocks' alone
      (image_z_image takes a block's own output back; z_image_z its own input forth), 'logdet_sum'
      (largest |forward + inverse| log-determinant, in bits per dimension),
      'bits_per_dim_error' (largest difference of an image's bits per dimension to float32), and
      'not_finite' and 'guided_not_finite' (shares of the samples, none drawn again).
      'trusted' says for each dtype whether it passes for 'sampling' and for 'likelihood'.
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
    """The forward pass taken back; `sequences` are the patches and what each block made of them."""
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
    """The patches followed by what every block makes of them, and the log-determinant [B]."""
    sequences, logdet = model.apply(variables, images, condition, method='trajectory')
    return [model.to_tokens(images), *sequences], logdet


def _block(model, variables, index):
    """The arguments that both directions of a block begin with, and its order."""
    return model.block(index), variables['params'][f'block_{index}'], model.block_orders()[index]


def _inverse(model, variables, index, z, condition):
    block, params, order = _block(model, variables, index)
    return block.inverse(params, z, condition, order)


@functools.partial(jax.jit, static_argnums=0)
def _block_forward(block, params, x_BxTxD, condition, order):
    """z of one block from x; as in sampling, one program for each depth."""
    return block.forward(params, x_BxTxD, condition, order)[0]


@jax.jit
def _error(found, wanted) -> dict[str, jax.Array]:
    """Of the images that are finite, and the share of those that are not; [B, ...] both."""
    difference = (found - wanted).reshape(found.shape[0], -1)
    finite = jnp.isfinite(difference).all(1)
    # XLA's maximum on a CPU passes over NaN.
    difference = jnp.where(finite[:, None], difference, 0.0)
    square = jnp.square(difference).mean(1).sum() / jnp.maximum(finite.sum(), 1)
    return {
        'max': abs(difference).max(), 'rms': jnp.sqrt(square), 'not_finite': _share_not(finite)
    }


def _largest(difference) -> float:
    """Infinite if any is not finite."""
    return float(jnp.where(jnp.isfinite(difference), abs(difference), jnp.inf).max())


def _not_finite(images) -> float:
    return float(_share_not(jnp.isfinite(images).all((1, 2, 3))))


def _share_not(good) -> jax.Array:
    # Counted in integers: 1 - mean() is not 0 for every number of images that are all good.
    return (~good).sum() / good.size


def rows(r: dict) -> list[tuple[str, str]]:
    """The rows of the printed table, from what `round_trip` returns."""
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
            f'forward + inverse {found["logdet_sum"]:.1e} bits/dim at most; off float32 by '
            f'{found["bits_per_dim_error"]:.1e} bits/dim at most; {finite}',
        ))
        verdict = ', '.join(f'{use} {"yes" if good else "NO"}' for use, good in passed.items())
        lines.append((f'{dtype} can be trusted for', verdict))
    return lines


def _as_text(error: dict) -> str:
    share = f', {error["not_finite"]:.1%} not finite' if error['not_finite'] else ''
    return f'{error["max"]:.1e} ({error["rms"]:.1e}){share}'
