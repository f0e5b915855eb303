"""Out-of-distribution detection with the exact likelihood: histograms of log p of several datasets.

A high likelihood does not mean that an image is typical: smooth images, such as constant ones, are
more likely than the training images (Nalisnick et al., arXiv 1810.09136 and 1906.02994). So each
dataset is scored by two detectors, and the histograms show the distributions.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from tarflow_jax import files
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.training.over_set import View, over_set
from tarflow_jax.training.validation import dequantized_log_prob

BINS = 60
MARGIN = 1.5  # margin of the histogram around the known datasets, in units of their width
BLOCK = 4  # side of the blocks that 'shuffled' moves, in pixels
_COLOURS = ('#1b6ca8', '#c8553d', '#3c896d', '#8e5ea2', '#c9a227', '#5b5b5b', '#2ec4b6')


def _noise(rng, pixels):
    return rng.integers(0, 256, pixels.shape, np.uint8)


def _constant(rng, pixels):
    return np.broadcast_to(rng.integers(0, 256, pixels.shape[-1:], np.uint8), pixels.shape)


def _blurred(rng, pixels):
    channels = [
        np.asarray(Image.fromarray(channel).filter(ImageFilter.GaussianBlur(2)))
        for channel in np.moveaxis(pixels, -1, 0)
    ]
    return np.stack(channels, -1)


def _shuffled(rng, pixels):
    H, W, C = pixels.shape
    m, n = H // BLOCK, W // BLOCK
    inside = slice(m * BLOCK), slice(n * BLOCK)
    blocks = pixels[inside].reshape(m, BLOCK, n, BLOCK, C).swapaxes(1, 2)
    moved = rng.permutation(blocks.reshape(m * n, BLOCK, BLOCK, C)).reshape(blocks.shape)
    shuffled = pixels.copy()
    shuffled[inside] = moved.swapaxes(1, 2).reshape(m * BLOCK, n * BLOCK, C)
    return shuffled


# Corruptions of test images, as functions of (rng, uint8 [H, W, C]).
CORRUPTIONS: dict[str, Callable] = {
    'blurred': _blurred,
    'negative': lambda rng, pixels: 255 - pixels,
    'upside down': lambda rng, pixels: pixels[::-1],
    'shuffled': _shuffled,
    'constant': _constant,
    'noise': _noise,
}


def corrupted(source, kind: str, seed: int = 0) -> View:
    """Returns a source with every image corrupted; the randomness depends on its index only."""

    def change(i, image):
        rng = np.random.default_rng((seed, int(i)))
        return np.ascontiguousarray(CORRUPTIONS[kind](rng, image))

    return View(source, range(len(source)), change)


def outliers(
    model: TarFlow, variables, sets: dict, *, mesh, batch_size: int, key, seed: int = 0,
    noise_std: float | None = None,
) -> dict:
    """Computes unconditional log p of several datasets, in float32 with uniform dequantization.

    Args:
      sets: sources by name. The first is the training set. The second is an unseen dataset of the
        same kind, and the other datasets are compared with it. Corruptions of the second are added.
      noise_std: the noise level, for noise-conditioned flows.
    Returns:
      'edges' of the histogram in bits per dimension (the first and last bin include values beyond
      them), and for every dataset its name, 'images', mean, 'median' and standard deviation of
      'bits_per_dim', and 'histogram' (fractions of its images). From the third dataset on, also the
      area under the ROC curve for separating it from the second (1 always, 0.5 never): by low log p
      ('auroc_low_log_p'), and by the distance of log p from the mean of the first
      ('auroc_atypical').
    """
    model = model.clone(dtype=jnp.float32)
    names = list(sets)
    unseen = names[1]
    sets = sets | {
        f'{unseen}, {kind}': corrupted(sets[unseen], kind, seed) for kind in CORRUPTIONS
    }

    def score(batch, keys):
        nothing = {'label': jnp.full_like(batch['label'], -1)}
        if model.num_features:
            shape = (len(batch['label']), model.num_features)
            nothing['features'] = jnp.full(shape, jnp.nan)
        batch = {'image': batch['image']} | nothing
        return dequantized_log_prob(model, variables, batch, keys, noise_std)

    bits = {}
    for name, source in sets.items():
        nats = over_set(score, source, mesh=mesh, batch_size=batch_size, key=key, what=name)
        bits[name] = np.asarray(likelihood.bits_per_dim(nats[0].astype(np.float64), model.num_dims))
    return summary(bits)


def summary(bits: dict[str, np.ndarray]) -> dict:
    """Computes the result of `outliers` from the bits per dimension [N] of each dataset."""
    trained, unseen = list(bits)[:2]
    known = np.concatenate([bits[trained], bits[unseen]])
    known = known[np.isfinite(known)]
    if not known.size:
        raise ValueError('log p is not finite for any image; the flow has diverged.')
    # The range is around the known datasets, because others may have thousands of bits.
    low, high = np.quantile(known, (0.005, 0.995))
    edges = np.linspace(low - MARGIN * (high - low), high + MARGIN * (high - low), BINS + 1)
    centre = bits[trained].mean()
    rows = []
    for name, values in bits.items():
        inside = np.clip(values, edges[0], edges[-1])
        row = {
            'set': name,
            'images': values.size,
            'bits_per_dim': values.mean(),
            'median': np.median(values),
            'standard_deviation': values.std(),
            'histogram': (np.histogram(inside, edges)[0] / values.size).tolist(),
        }
        if name not in (trained, unseen):
            row['auroc_low_log_p'] = auroc(values, bits[unseen])
            row['auroc_atypical'] = auroc(abs(values - centre), abs(bits[unseen] - centre))
        rows.append(row)
    return {'edges': edges.tolist(), 'sets': rows}


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """Computes the area under the ROC curve: P(positive [N] > negative [M]), ties count half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, 'left') + np.searchsorted(ordered, positive, 'right')
    return below.mean() / (2 * negative.size)


def histogram_picture(found: dict, path, width: int = 900, row: int = 90) -> None:
    """Writes the histograms of `outliers` as a PNG, one row per dataset with a common axis."""
    margin, axis = 30, 40
    height = margin + row * len(found['sets']) + axis
    picture = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(picture)
    low, high = found['edges'][0], found['edges'][-1]
    scale = (width - 2 * margin) / (high - low or 1)
    place = lambda bits: margin + (bits - low) * scale  # noqa: E731
    for i, one in enumerate(found['sets']):
        base = margin + row * (i + 1) - 14
        tallest = max(one['histogram'])
        for left, right, share in zip(found['edges'], found['edges'][1:], one['histogram']):
            if share:
                top = base - share / tallest * (row - 34)
                draw.rectangle((place(left), top, place(right), base), _COLOURS[i % len(_COLOURS)])
        draw.line((margin, base, width - margin, base), 'black')
        draw.text((margin, base - row + 18), f'{one["set"]}: {one["bits_per_dim"]:.3f}', 'black')
    for tick in np.linspace(low, high, 7):
        draw.text((place(tick) - 12, height - axis), f'{tick:.2f}', 'black')
    draw.text((margin, height - axis + 18), 'bits per dimension', 'black')
    with files.replacing(path) as file:
        picture.save(file, format='PNG')


def rows(r: dict) -> list[tuple[str, str]]:
    """Returns the rows of the printed table, from the result of `outliers`."""
    found = []
    for one in r['sets']:
        value = f'{one["bits_per_dim"]:.3f} +- {one["standard_deviation"]:.3f}'
        value += f', median {one["median"]:.3f}'
        if 'auroc_atypical' in one:
            value += f'  (AUROC {one["auroc_atypical"]:.3f} by atypical log p, '
            value += f'{one["auroc_low_log_p"]:.3f} by low log p)'
        found.append((f'bits/dim of: {one["set"]}', value))
    return [*found, ('histogram', 'outliers.png')]
