"""The sections that need real images: the neighbours of samples, and likelihoods."""

import numpy as np

from tarflow_jax.evaluation.report import charts
from tarflow_jax.evaluation.report.markup import figure, grid, number, paragraph, pictures_of
from tarflow_jax.evaluation.report.words import class_name, warning

NEAR = 0.5  # of the usual distance: samples this near look like copies
SURE = 3  # standard errors from which a difference counts


def neighbours(found: dict) -> str:
    """Shows the training images nearest to samples, and says whether they are unusually near."""
    near = found['neighbours']
    searched = f'{near["searched"]:,} of {found["data"]["train"]["images"]:,}'
    mirrored = ' and their mirror images' if near['mirrored'] else ''
    text = paragraph(
        'Has the flow memorized its training images? Each row begins with a sample. Beside it are '
        f'the nearest training images, among {searched} evenly spaced ones{mirrored}. '
        'The distance is the root mean square difference of the pixels, in grey levels (0 to 255): '
        'a copy has distance 0.'
    )
    if not len(near['samples']):
        return text + paragraph('No sample is finite, so none was compared.', 'warning')
    ours, real = np.median(near['distances'][:, 0]), np.median(near['real'])
    verdict = (
        'The samples are much nearer than unseen images are: look at the pairs for copies.'
        if ours < NEAR * real else 'The samples are not unusually near.'
    )
    text += paragraph(
        f'Half of the samples here are within {ours:.1f} grey levels of a training image; half of '
        f'{len(near["real"])} real test images are within {real:.1f}. {verdict} Smooth or dark '
        'pictures are near to many others. This search does not find shifted copies, or copies of '
        'images outside it.'
    )
    figures = []
    for i, sample in enumerate(near['samples']):
        name = class_name(found, near['rows'][i])
        distances = ', '.join(f'{x:.1f}' for x in near['distances'][i])
        alt = f'A sample, {name}, and its {near["images"].shape[1]} nearest training images'
        shown = np.stack([sample, *near['images'][i]])
        figures.append(pictures_of(name, shown, alt, f'distances {distances}'))
    return text + grid(figures, 'small')


def likelihoods(found: dict) -> str:
    """Shows the likelihoods of training and test images, and the extremes of the test images."""
    likely = found['likelihoods']
    bits, train = likely['bits'], likely['train_bits']
    text = paragraph(
        'The flow gives every image a probability. In bits per dimension, fewer are more probable. '
        f'Here are {len(bits):,} evenly spaced test images and {len(train):,} training images.'
    )
    text += _difference(train, bits)
    text += warning(int((~np.isfinite(bits)).sum()), len(bits), 'likelihoods')
    text += figure('Bits per dimension of training and test images', charts.histogram({
        'training images': train, 'test images': bits,
    }))
    text += paragraph(
        'The most and the least likely test images. Plain and smooth images are probable whatever '
        'they show: this ranks how hard an image is to predict, not how typical it is.'
    )
    figures = []
    for key, title in (('most', 'Most likely'), ('least', 'Least likely')):
        images, own = likely[key]
        if not len(images):
            continue
        alt = f'The {len(images)} {title.lower()} test images'
        caption = f'from {number(float(own[0]))} to {number(float(own[-1]))} bits per dimension'
        figures.append(pictures_of(title, images, alt, caption, min(len(images), 6)))
    return text + grid(figures)


def _difference(train: np.ndarray, test: np.ndarray) -> str:
    """Says whether test images cost more than training images."""
    sets = [x[np.isfinite(x)] for x in (train, test)]
    if min(map(len, sets)) < 2:
        return ''
    known, unseen = (x.mean() for x in sets)
    error = np.sqrt(sum(x.var(ddof=1) / x.size for x in sets))
    gap = unseen - known
    verdict = (
        'Nothing here shows that the flow has memorized its training images.'
        if gap < SURE * error else
        'Unseen images cost more: the flow has memorized its training images to this degree.'
    )
    return paragraph(
        f'On average a training image costs {known:.3f} bits per dimension and a test image '
        f'{unseen:.3f}, a difference of {gap:.3f} (standard error {error:.3f}). {verdict}'
    )
