"""The sections on sampling: from noise to image, down the noise levels, guidance, interpolation."""

import numpy as np

from tarflow_jax.evaluation.report.markup import (
    beside,
    film,
    grid,
    heading,
    missing,
    paragraph,
    pictures_of,
)
from tarflow_jax.evaluation.report.samples import own_scale
from tarflow_jax.evaluation.report.words import class_name, not_finite, warning

TRAJECTORIES = 4
MOST_COLUMNS = 5  # pictures side by side in a film


def _rows(found, count: int) -> str:
    return ', '.join(class_name(found, row) for row in range(count))


def _columns(count: int) -> int:
    """Returns the columns that fill the fewest rows evenly: 5 of 10 pictures, 3 of 6."""
    return -(-count // -(-count // MOST_COLUMNS))


def noise_to_image(found: dict) -> str:
    """Shows sampling patch by patch as a film, and block by block as pictures."""
    s = found['samples']
    way, clean, frames = s['trajectory'], s.get('denoised'), list(s['moments'])
    names, count = list(s['moment_names']), len(s['moments'][0])
    if clean is not None:
        frames, names = [*frames, clean[:, 0]], [*names, 'denoised']
    text = paragraph(
        f'Sampling inverts the {len(way) - 1} blocks of the flow one after another, the last block '
        'first, and each block patch by patch. The film follows the first sample of each row '
        'above. Pictures before the image are brightened or darkened to fit, as their numbers are '
        'not colours yet. A block that makes much of the image appear does much of the work.'
    )
    text = beside(text, film(
        frames, names, f'{count} samples ({_rows(found, count)}) from noise to image',
        columns=_columns(count), name='Moment of sampling',
    ))
    end = ', then the denoised image' if clean is not None else ''
    text += heading('Block by block') + paragraph(
        f'From left to right: the noise, then the output of each block{end}.'
    )
    stages = [own_scale(x) for x in way[:-1]] + [way[-1]]
    figures = []
    for row in range(min(TRAJECTORIES, way.shape[1])):
        shown = [x[row] for x in stages] + ([] if clean is None else [clean[row, 0]])
        alt = f'From noise to image in {len(shown)} pictures, {class_name(found, row)}'
        figures.append(pictures_of(class_name(found, row), np.stack(shown), alt))
    return text + grid(figures)


def denoising(found: dict) -> str:
    """Shows what denoising does: a film down the noise levels, or pictures before and after."""
    s = found['samples']
    if 'film' in s:
        return _levels(found)
    if 'denoised' not in s:
        return ''
    rows = len(s['raw'])
    text = paragraph(
        'The flow learned from noisy images, so its samples are noisy, too. The gradient of its '
        'own likelihood points to the clean image, and one step along it removes the noise. These '
        'are the first samples of each row above.'
    )
    pairs = [
        pictures_of(name, s[key][:, 0], f'{rows} samples, {name}', columns=_columns(rows))
        for key, name in (('raw', 'as drawn'), ('denoised', 'denoised'))
    ]
    return text + grid(pairs)


def _levels(found) -> str:
    s = found['samples']
    levels = [f'{level:.2g}' for level in s['film_levels']]
    count = len(s['film'])
    text = paragraph(
        'This flow knows many noise levels. A sample is drawn at the highest level, '
        f'{levels[0]}. From there it follows the gradient of the likelihood down, level by level, '
        'to the finished image. The sample settles what the picture shows; the way down clears its '
        'noise. Noise that stays to the end means that the flow has not learned its levels yet.'
    )
    alt = f'{count} samples ({_rows(found, count)}), each at {len(levels)} noise levels from '
    return beside(text, film(
        list(s['film'].swapaxes(0, 1)), [f'noise level {level}' for level in levels],
        f'{alt}{levels[0]} to 0', columns=_columns(count), name='Noise level',
    ))


def guidance(found: dict) -> str:
    """Shows the same noise under several guidance weights."""
    s, sweep, own = found['samples'], found['samples']['sweep'], found['guidance']['weight']
    weaker = 'without the class' if s['labels'] is not None else (
        f'with blurred attention (temperature {sweep.temperature:g})'
    )
    text = paragraph(
        f'Guidance moves each prediction away from a weaker one, made {weaker}. A larger weight '
        'gives clearer and less varied images; too large a weight breaks them. All of these start '
        'from the same noise, that of the first sample of each row above.'
    )
    figures, bad, total = [], 0, 0
    for weight, images in s['guided'].items():
        name = f'weight {weight:g}' if weight else 'no guidance'
        caption = 'as above' if weight == own else ''
        bad, total = bad + not_finite(images), total + len(images)
        alt = f'{len(images)} samples from the same noise, {name}'
        figures.append(pictures_of(name, images, alt, caption, _columns(len(images))))
    settings = f'target {sweep.target}, rule {sweep.rule}'
    settings += ', growing along the sequence' if sweep.annealed else ''
    text += warning(bad, total, 'of these')
    text += paragraph(f'The other fields of the guidance: {settings}.')
    return text + grid(figures, 'tiny')


def between(found: dict) -> str:
    """Shows interpolations between two samples."""
    images = found['samples']['between']
    if not len(images):
        return missing('A row has only one sample, and interpolation needs two. Ask for more with',
                       '--config.report.columns=2')
    text = paragraph(
        'The ends of each row are two samples. The noise that they were made from is rotated in '
        'equal steps from the first to the second, which keeps its length. A flow that has learned '
        'what images have in common shows an image at every step. One that has not fades one '
        'picture into the other.'
    )
    figures = []
    for row, way in enumerate(images):
        name = class_name(found, row)
        alt = f'{len(way)} pictures from one sample to another, {name}'
        figures.append(pictures_of(name, way, alt))
    warned = warning(not_finite(images), images.shape[0] * images.shape[1], 'of these')
    return text + warned + grid(figures)
