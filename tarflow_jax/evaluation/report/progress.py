"""The sections that show a run over its training: curves, and the image grids of its steps."""

import numpy as np

from tarflow_jax.evaluation.report import charts, timeline
from tarflow_jax.evaluation.report.markup import (
    figure,
    film,
    grid,
    missing,
    paragraph,
)
from tarflow_jax.evaluation.report.words import metrics_flag

AXIS = (
    '<fieldset class="axis scripted"><legend>Horizontal axis</legend>'
    '<label><input type="radio" name="axis" value="steps" checked> steps</label>'
    '<label><input type="radio" name="axis" value="hours"> hours</label></fieldset>'
)


def training(found: dict) -> str:
    """Shows the loss, its terms and bits per dimension over training."""
    metrics = found['metrics']
    if not any('loss' in line for line in metrics):
        return missing('There are no curves: metrics.jsonl is missing or holds no loss. Training '
                       'writes it:', '--mode=train')
    evaluation = found['evaluation'] or {'scores': {}}
    scores = evaluation['scores'].get('bits_per_dim')
    step = scores and scores.get('from', evaluation)['checkpoint'].get('step')
    scored = (step, scores['bits_per_dim']) if step is not None else None
    text = AXIS if len(timeline.hours(metrics)[0]) else ''
    text += grid([
        figure('', charts.losses(metrics), lead='Loss'),
        figure('', charts.terms(metrics), lead='The two terms of the loss'),
        figure('', charts.bits(metrics, scored), lead='Bits per dimension'),
    ], 'charts')
    text += _validation(metrics) + paragraph(
        'The loss is the negative log-likelihood of noisy images, without a constant; lower is '
        'better. It is the sum of two terms. The prior term asks for small latents; it is 0.5 when '
        'they are as large as Gaussian noise. Minus the log-determinant is the price of shrinking '
        'the image to that size.'
    )
    if 'film' in found['samples']:
        text += paragraph(
            'Here the loss of each image is multiplied by a weight that depends on its noise '
            'level. The two terms and the bits per dimension are without it.'
        )
    text += paragraph(
        'Bits per dimension say how many bits a number of an image costs when the flow compresses '
        'it. ' + (
            'This flow was trained with Gaussian noise, so the line of its training batches is for '
            'noisy images. Compare it only with runs of the same noise, not with the test set or '
            'with published numbers.'
            if found['noise_std'] else
            'With uniform noise the line and the score of the test set mean the same.'
        )
    )
    _, skipped = charts.series(metrics, 'skipped')
    if skipped and skipped[-1] > 0:
        text += paragraph(
            f'{skipped[-1]:,.0f} steps were skipped, because their gradient was not finite.',
            'warning',
        )
    if scored is None:
        text += missing('The score of the test set is missing; it comes with',
                        metrics_flag('bits_per_dim'))
    return text


def _validation(metrics) -> str:
    steps, losses = charts.series(metrics, 'validation/loss')
    losses = np.array(losses, float)
    if not np.isfinite(losses).any():
        return ''
    text = (
        'Validation scores held-out images and as many training images, with the same noise each '
        'time. While both lines fall, the flow learns. When the held-out line rises, it starts '
        'to memorize.'
    )
    best = int(np.nanargmin(losses))
    text += f' The held-out loss is lowest at step {steps[best]:,}: {losses[best]:.4g}.'
    return paragraph(text)


def steps(found: dict) -> str:
    """Shows the image grids that training wrote, one step after another."""
    grids = found['grids']
    if len(grids['steps']) < 2:
        return ''
    at, hours = timeline.hours(found['metrics'])
    labels = [f'step {step:,}' for step in grids['steps']]
    if len(at):
        labels = [
            f'{label}, after {duration(np.interp(step, at, hours))}'
            for label, step in zip(labels, grids['steps'])
        ]
    kind = {'guided': 'with guidance', 'denoised': 'denoised', 'raw': 'as drawn'}[grids['kind']]
    text = f'Samples during training, always from the same noise ({kind}).'
    if grids['names']:
        text += f' The columns: {", ".join(grids["names"])}.'
    alt = f'{grids["frames"][0].shape[0]} samples at {len(labels)} steps of training, {kind}'
    return paragraph(text) + film(
        grids['frames'], labels, alt, columns=grids['columns'], name='Step of training'
    )


def duration(hours: float) -> str:
    """Writes a time as hours, or as minutes below one hour."""
    return f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'
