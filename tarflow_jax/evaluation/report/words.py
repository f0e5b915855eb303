"""Words and numbers that several sections of the report share."""

import numpy as np

from tarflow_jax.data import sizes
from tarflow_jax.evaluation.report.markup import paragraph

EVALUATE = '--mode=evaluate'


def metrics_flag(*names: str) -> str:
    """Returns the flag that asks for these scores."""
    listed = ','.join(f'"{name}"' for name in names)
    listed += ',' if len(names) == 1 else ''
    return f"{EVALUATE} --config.evaluate.metrics='({listed})'"


def class_name(found: dict, row: int) -> str:
    """Names the class of a row of samples, or the row itself where there are no classes."""
    labels, names = found['samples']['labels'], found['class_names']
    if labels is None:
        return f'sample {row + 1}'
    return f'class {labels[row]}' if names is None else names[labels[row]]


def set_name(about: dict) -> str:
    name, split = about.get('dataset', '?'), about.get('split', '?')
    return f'{name}, split {split}, {about["images"]:,} images'


def sides(size) -> str:
    """Writes a size of `flow.architecture` as text, such as '64x64'."""
    return 'x'.join(map(str, sizes.pair(size)))


def architecture(model: dict, parameters: int) -> str:
    """Describes the flow in a line."""
    depths = ' + '.join(map(str, model['layers_per_block']))
    classes = f'{model["num_classes"]} classes' if model['num_classes'] else 'no classes'
    channels = model['image_channels']
    return (
        f'{sides(model["image_size"])} pixels, {channels} channel{"s" if channels > 1 else ""}, '
        f'patches of {sides(model["patch_size"])}, {len(model["layers_per_block"])} blocks of '
        f'{depths} layers, width {model["width"]}, {classes}, {parameters:,} parameters'
    )


def noise(found: dict) -> str:
    """Describes the noise of training."""
    low, high = found['lowest_noise_std'], found['noise_std']
    if not high:
        return 'uniform, within the step between two grey levels'
    if low == high:
        return f'Gaussian, standard deviation {high:g} (images span -1 to 1)'
    return f'Gaussian, standard deviations {low:g} to {high:g} (images span -1 to 1)'


def how_drawn(found: dict) -> str:
    """Describes how the samples of the page were drawn: 'with guidance weight 1, then denoised'."""
    weight = found['guidance']['weight']
    drawn = f'with guidance weight {weight:g}' if weight else 'without guidance'
    return f'{drawn}, then denoised' if found['denoises'] else drawn


def not_finite(images) -> int:
    """Counts the images [..., H, W, C] that are not finite."""
    return int((~np.isfinite(images).reshape(*images.shape[:-3], -1).all(-1)).sum())


def warning(count: int, total: int, what: str) -> str:
    """Warns of numbers that are not finite; '' if there are none."""
    if not count:
        return ''
    return paragraph(
        f'{count} of {total} {what} are not finite: numbers overflowed on the way. They show as '
        'grey or as noise here. --mode=sample draws such images again.', 'warning',
    )


def sentence(text: str | None) -> str:
    """Makes a warning of a text that begins in lower case and has no full stop; '' of None."""
    return paragraph(f'{text[:1].upper()}{text[1:]}.', 'warning') if text else ''
