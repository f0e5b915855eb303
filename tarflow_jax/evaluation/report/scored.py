"""The sections made from evaluation.json: classification, all scores, and the certificate."""

import html

import numpy as np

from tarflow_jax.evaluation.levels import MEANING
from tarflow_jax.evaluation.report import charts
from tarflow_jax.evaluation.report.markup import (
    figure,
    grid,
    heading,
    missing,
    paragraph,
    table,
    wide,
)
from tarflow_jax.evaluation.report.words import metrics_flag, sentence, set_name
from tarflow_jax.evaluation.scores import SCORES

LARGEST_TABLE = 20  # classes of a confusion matrix that is shown as a table
TITLES = {
    'bits_per_dim': 'Bits per dimension',
    'classification': 'Classification',
    'levels': 'Noise levels',
    'outliers': 'Outliers',
    'frechet': 'Frechet distance, precision and recall',
}
MOST_CONFUSED = 6  # pairs of classes that are named


def classification(found: dict) -> str:
    """Shows the calibration curve and the confusion matrix, where classification was scored."""
    scores = (found['evaluation'] or {'scores': {}})['scores']
    result = scores.get('classification')
    if result is None:
        if found['model']['num_classes'] < 2:
            return ''
        return missing('How well the flow classifies is not scored yet; it comes with',
                       metrics_flag('classification'))
    text = paragraph(
        'A flow that knows classes classifies an image by the class under which it is most likely. '
        f'Of {result["images"]:,} test images it gets {result["accuracy"]:.1%} right '
        f'(standard error {result["accuracy_standard_error"]:.1%}).'
    )
    curve = figure(
        'Accuracy over confidence; larger points stand for more images',
        charts.calibration(result['reliability']), lead='Calibration',
    ) if result.get('reliability') else ''
    text += paragraph(
        'A calibrated classifier lies on the diagonal. A flow is usually too sure of itself, '
        'because the likelihoods of whole images differ by many nats: here its mean confidence is '
        f'{result["confidence"]:.1%}. The calibration error is {result["calibration_error"]:.3f}, '
        f'and {result["calibration_error_at_temperature"]:.3f} with log p divided by '
        f'{result["temperature"]:.4g}.'
    )
    matrix = result.get('confusion')
    if matrix is None:
        return text + curve + missing(
            'The confusion matrix is missing: there are more than 100 classes, or an earlier '
            'version scored. In that case it comes with', metrics_flag('classification'),
        )
    counts = np.array(matrix['counts'])
    text += _confusions(matrix['classes'], counts)
    return text + grid([curve, _confusion(matrix['classes'], counts)])


def _confusions(names: list[str], counts: np.ndarray) -> str:
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(wrong, axis=None, kind='stable')[::-1][:MOST_CONFUSED]
    pairs = [np.unravel_index(i, counts.shape) for i in order]
    told = [f'{names[a]} as {names[b]} ({wrong[a, b]:,})' for a, b in pairs if wrong[a, b]]
    return paragraph(f'The most frequent mistakes: {", ".join(told)}.') if told else ''


def _confusion(names: list[str], counts: np.ndarray) -> str:
    caption = 'Rows are the true classes, columns the predicted ones'
    if len(counts) > LARGEST_TABLE:
        chart = charts.confusion(counts)
        return figure(f'{caption}; shares of each row', chart, lead='Confusion matrix')
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    head = ''.join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    rows = ''
    for name, own, shares in zip(names, counts, share):
        cells = ''.join(
            f'<td class="{"much" if s > 0.45 else "none" if not c else ""}" '
            f'style="--share:{100 * s:.0f}%">{c:,}</td>'
            for c, s in zip(own, shares)
        )
        rows += f'<tr><th scope="row">{html.escape(name)}</th>{cells}</tr>'
    content = (
        f'<table class="confusion"><thead><tr><td></td>{head}</tr></thead><tbody>{rows}</tbody>'
        '</table>'
    )
    return figure(f'{caption}; numbers of images', wide(content, 'Confusion matrix'),
                  lead='Confusion matrix')


def scores(found: dict) -> str:
    """Shows every score as a table, then the certificate."""
    evaluation = found['evaluation']
    if evaluation is None:
        return missing('evaluation.json is missing. Scores and the certificate come with',
                       metrics_flag('bits_per_dim', 'round_trip'))
    text = paragraph(
        f'From evaluation.json: {evaluation["checkpoint"]["name"]}, on '
        f'{set_name(evaluation["data"])}.'
    ) + sentence(evaluation['data'].get('caution'))
    if evaluation['checkpoint'] != found['origin']:
        text += paragraph('The rest of the page shows another checkpoint.', 'warning')
    results = dict(evaluation['scores'])
    certificate = results.pop('round_trip', None)
    for name, result in results.items():
        text += table([], _rows(name, result), TITLES.get(name, name))
        if name == 'levels':
            text += paragraph(MEANING) + figure('Bits per dimension at noise levels',
                                                charts.levels(result))
    if 'film' in found['samples'] and 'levels' not in results:
        text += missing('How the likelihood changes with the noise level is not scored yet; it '
                        'comes with', metrics_flag('levels'))
    text += heading('Certificate') + paragraph(
        'On paper a flow is exactly invertible. A computer rounds, and a flow that stretches much '
        'can lose all digits. The certificate measures the error of a round trip through the flow.'
    )
    if certificate is None:
        return text + missing('It is missing; it comes with', metrics_flag('round_trip'))
    rows = _rows('round_trip', certificate)
    return text + table([], rows, 'image -> z -> image and z -> image -> z')


def _rows(name: str, result: dict) -> list:
    rows = list(SCORES[name].rows(result))
    if 'from' in result:
        rows.append(('scored earlier', f'with {result["from"]["checkpoint"]["name"]}'))
    return rows


def blocks(found: dict) -> str:
    """Shows what each block does to images, and in how many calls it decodes in parallel."""
    calls, positions = found['samples']['iterations'], found['positions']
    text = paragraph(
        'Each block predicts a patch from the patches before it, as a shift and a log-scale, and '
        'removes both. The mean square of its output shows how much is left; that of pure noise is '
        '1. A log-scale far from 0 stretches or shrinks numbers much, and rounding errors with '
        'them.'
    )
    text += paragraph(
        f'Sequential sampling takes {positions - 1} network calls for each block. Parallel '
        'decoding (Jacobi) guesses all patches at once and corrects the guess until it stays the '
        'same. Where few calls are enough, the patches hardly depend on each other.'
    )
    rows = [
        [f'block {b}', one['mean_square'], one['smallest'], one['mean'], one['largest'],
         float(calls['calls'][b].mean()), int(calls['calls'][b].max())]
        for b, one in enumerate(found['blocks'])
    ]
    head = ['', 'mean square', 'smallest log-scale', 'mean log-scale', 'largest log-scale',
            'Jacobi calls, mean', 'Jacobi calls, most']
    text += table(
        head, rows, f'{found["block_images"]} test images with the noise of training; '
        f'{calls["calls"].shape[1]} samples decoded in parallel, without guidance',
    )
    failed = int(calls['sequential'].sum())
    if failed:
        text += paragraph(
            f'{failed} of these samples did not settle in parallel. They were drawn sequentially, '
            'and the calls for that are counted.', 'warning',
        )
    text += paragraph(
        'Sent back through the flow, these samples give the noise they were made from to within '
        f'{float(calls["round_trip"].max()):.2g} (noise has standard deviation 1).'
    )
    if any('mean_square/block_0' in line for line in found['metrics']):
        chart = charts.mean_squares(found['metrics'], len(found['blocks']))
        text += figure('Mean square of the output of each block over training', chart)
    return text
