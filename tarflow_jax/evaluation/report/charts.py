"""Makes the charts of the report, which the reader can zoom, and gives the library that draws them.

A chart is data for `page.js`, which draws it in the colours of the page.
"""

import html
import json
import math

import numpy as np
import plotly.offline

from tarflow_jax.evaluation.report import timeline
from tarflow_jax.flow import likelihood

# Readable on white and on black.
COLOURS = ('#2f72c9', '#d2611c', '#2f9355', '#8f63cf', '#cf4468', '#788493', '#a88a12', '#12909e')
MOST_POINTS = 1500  # of a line: a long run would otherwise fill the page with numbers
BINS = 40


def script() -> str:
    """Returns the whole chart library, so that the page needs no network."""
    return plotly.offline.get_plotlyjs()


def series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and the values of one metric, in the order written."""
    found = [(line['step'], line[name]) for line in metrics if name in line]
    return [step for step, _ in found], [value for _, value in found]


def loss_bits(metrics: list[dict]) -> tuple[list[int], np.ndarray]:
    """Returns steps, and the bits per dimension of the noisy training images there.

    They come from the terms of the loss: unlike the loss, these have no weights of noise levels.
    """
    whole = [line for line in metrics if line.keys() >= {'prior', 'logdet'}]
    (steps, prior), (_, logdet) = series(whole, 'prior'), series(whole, 'logdet')
    nats = np.array(logdet, float) - np.array(prior, float) - 0.5 * math.log(2 * math.pi)
    return steps, np.asarray(likelihood.bits_per_dim(nats, 1))


def losses(metrics: list[dict]) -> str:
    """Draws the training loss and, where they were measured, those of validation."""
    chart = _Chart('losses', 'step', 'loss, nats per dimension', metrics)
    faint = 'validation/loss' in _names(metrics)
    chart.line(*series(metrics, 'loss'), 'training batches', faint=faint)
    _validation(chart, metrics, 'loss')
    return chart.html('Loss over training')


def terms(metrics: list[dict]) -> str:
    """Draws the two terms whose sum is the training loss."""
    chart = _Chart('terms', 'step', 'nats per dimension', metrics)
    steps, logdet = series(metrics, 'logdet')
    chart.line(*series(metrics, 'prior'), 'prior: half the mean square of z')
    chart.line(steps, -np.array(logdet, float), 'minus the log-determinant')
    return chart.html('The two terms of the loss over training')


def bits(metrics: list[dict], scored: tuple[int, float] | None) -> str:
    """Draws the bits per dimension of training, of validation and of the test set's score."""
    chart = _Chart('bits', 'step', 'bits per dimension', metrics)
    chart.line(*loss_bits(metrics), 'training batches, with their noise',
               faint='validation/bits_per_dim' in _names(metrics))
    _validation(chart, metrics, 'bits_per_dim')
    if scored is not None:
        chart.line([scored[0]], [scored[1]], 'test set (8-bit pixels)', marker='diamond')
    return chart.html('Bits per dimension over training')


def mean_squares(metrics: list[dict], blocks: int) -> str:
    """Draws the mean square of every block's output over training."""
    chart = _Chart('mean-squares', 'step', 'mean square of the output', metrics)
    for b in range(blocks):
        chart.line(*series(metrics, f'mean_square/block_{b}'), f'block {b}')
    return chart.html('Mean square of the output of each block over training')


def levels(found: dict) -> str:
    """Draws the bits per dimension of noisy images and of the noise alone over the noise level."""
    chart = _Chart('levels', 'noise level', 'bits per dimension')
    for key, name in (
        ('bits_per_dim', 'noisy test images'), ('noise_bits_per_dim', 'the noise alone'),
    ):
        chart.line(found['levels'], found[key], name)
    return chart.html('Bits per dimension over the noise level', log=True)


def histogram(sets: dict[str, np.ndarray]) -> str:
    """Draws how the bits per dimension of images are distributed, for each set [N] by its name."""
    chart = _Chart('likelihoods', 'bits per dimension', 'share of the images')
    finite = {name: values[np.isfinite(values)] for name, values in sets.items()}
    together = np.concatenate(list(finite.values()))
    if together.size:
        edges = np.histogram_bin_edges(together, BINS)
        for name, values in finite.items():
            share = np.histogram(values, edges)[0] / max(values.size, 1)
            middles = (edges[1:] + edges[:-1]) / 2
            chart.line(middles, share, name, shape='hvh', filled=True)
    return chart.html('Distribution of the bits per dimension')


def calibration(reliability: list) -> str:
    """Draws accuracy over confidence, from rows [confidence, accuracy, images]."""
    chart = _Chart('calibration', 'confidence', 'accuracy')
    confidence, accuracy, images = np.array(reliability, float).T
    chart.line([0, 1], [0, 1], 'perfectly calibrated', dashed=True)
    chart.line(confidence, accuracy, 'this flow', sizes=8 + 20 * np.sqrt(images / images.sum()),
               texts=[f'{count:,.0f} images' for count in images])
    return chart.html('Calibration: accuracy over confidence', unit=True)


def confusion(counts) -> str:
    """Draws a confusion matrix too large for a table, as shares of each true class."""
    counts = np.array(counts, float)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    chart = _Chart('confusion', 'predicted class', 'true class')
    chart.traces.append(dict(type='heatmap', z=share.round(3).tolist(), zmin=0, zmax=1))
    return chart.html('Confusion matrix')


def runs(name: str, x: str, y: str, lines: list[tuple], metrics: list[list[dict]]) -> str:
    """Draws one metric of several runs, for the page that compares them.

    Args:
      lines: (run, steps, values, label, dashed) each; a run has one colour.
      metrics: of each run, for its hours.
    """
    chart = _Chart(name, x, y)
    for run, steps, values, label, dashed in lines:
        chart.timed(metrics[run])
        chart.line(steps, values, label, dashed=dashed, colour=COLOURS[run % len(COLOURS)],
                   faint=False)
    return chart.html(f'{y} of each run')


def _names(metrics) -> set[str]:
    return {name for line in metrics for name in line}


def _validation(chart: '_Chart', metrics, name: str) -> None:
    for key, label in (
        (f'validation/{name}', 'held-out images'),
        (f'validation/train_{name}', 'as many training images'),
    ):
        steps, values = series(metrics, key)
        if steps:
            chart.line(steps, values, label, marker='circle')


class _Chart:
    """The traces of a chart and its axes; over training, each trace has its hours, too."""

    def __init__(self, name: str, x: str, y: str, metrics: list[dict] | None = None):
        self.traces: list[dict] = []
        self._name, self._axes = name, (x, y)
        self._steps, self._hours = timeline.hours(metrics or [])

    def timed(self, metrics: list[dict]) -> None:
        """Takes the hours of the next lines from these metrics."""
        self._steps, self._hours = timeline.hours(metrics)

    def line(
        self, x, y, name: str, *, marker: str = '', dashed=False, filled=False, faint=False,
        shape='linear', sizes=None, texts=None, colour: str = '',
    ) -> None:
        every = max(1, -(-len(x) // MOST_POINTS))
        x, y = np.asarray(x, float)[::every], np.asarray(y, float)[::every]
        colour = colour or COLOURS[len(self.traces) % len(COLOURS)]
        mode = 'lines' if len(x) > 1 else 'markers'
        trace = dict(
            type='scatter', x=_numbers(x), y=_numbers(y), name=name,
            mode=f'{mode}+markers' if (marker or sizes is not None) and mode == 'lines' else mode,
            line=dict(color=colour, width=2, shape=shape, **({'dash': 'dash'} if dashed else {})),
            marker=dict(color=colour, size=6 if len(x) > 1 else 11, symbol=marker or 'circle'),
        )
        if filled:
            trace |= {'fill': 'tozeroy', 'fillcolor': f'{colour}33'}
        if faint:
            trace['opacity'] = 0.45
        if sizes is not None:
            trace['marker']['size'] = _numbers(sizes)
        if texts is not None:
            trace['text'] = texts
        if len(self._steps):
            trace['meta'] = {'hours': _numbers(np.interp(x, self._steps, self._hours))}
        self.traces.append(trace)

    def html(self, label: str, *, log=False, unit=False) -> str:
        x, y = self._axes
        hours = bool(self.traces) and all('hours' in one.get('meta', {}) for one in self.traces)
        chart = dict(traces=self.traces, x=x, y=y, log=log, unit=unit, hours=hours)
        # A closing tag inside the data would end the script that holds it.
        data = json.dumps(chart).replace('<', '\\u003c')
        return (
            f'<div class="chart" id="chart-{self._name}" role="img" '
            f'aria-label="Chart: {html.escape(label)}">'
            f'<script type="application/json">{data}</script></div>'
        )


def _numbers(values) -> list[float | None]:
    """Numbers to six digits, as the page carries them as text; None where one is not finite."""
    return [float(f'{v:.6g}') if math.isfinite(v) else None for v in np.asarray(values, float)]
