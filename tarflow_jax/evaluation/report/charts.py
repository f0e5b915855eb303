"""The charts of the report, which the reader can zoom; and the script that draws them, once."""

import math

import numpy as np
import plotly.graph_objects as go
import plotly.io
import plotly.offline

from tarflow_jax.flow import likelihood

COLOURS = ('#2457a6', '#c2571a', '#2b7a4b', '#7a4bb0', '#b0294f', '#5b6470', '#8a7200', '#00798c')


def script() -> str:
    """The library, whole: the page asks for nothing from elsewhere."""
    return plotly.offline.get_plotlyjs()


def series(metrics: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of one metric, in the order written."""
    found = [(line['step'], line[name]) for line in metrics if name in line]
    return [step for step, _ in found], [value for _, value in found]


def losses(metrics: list[dict]) -> str:
    """The training loss and the two terms that it is the sum of, over steps."""
    figure = go.Figure()
    for name, key, sign in (
        ('loss', 'loss', 1), ('prior: half the mean square of z', 'prior', 1),
        ('minus the log-determinant', 'logdet', -1),
    ):
        steps, values = series(metrics, key)
        _line(figure, steps, sign * np.array(values, float), name)
    return _html(figure, 'losses', 'step', 'nats per dimension')


def loss_bits(metrics: list[dict]) -> tuple[list[int], np.ndarray]:
    """Steps and the bits per dimension of the noisy images there.

    From the terms of the loss, which noise levels do not weight as they do the loss.
    """
    whole = [line for line in metrics if line.keys() >= {'prior', 'logdet'}]
    (steps, prior), (_, logdet) = series(whole, 'prior'), series(whole, 'logdet')
    nats = np.array(logdet, float) - np.array(prior, float) - 0.5 * math.log(2 * math.pi)
    return steps, np.asarray(likelihood.bits_per_dim(nats, 1))


def bits(metrics: list[dict], scored: tuple[int, float] | None) -> str:
    """Bits per dimension of the training loss, and of the test set where it was scored."""
    figure = go.Figure()
    _line(figure, *loss_bits(metrics), 'training images with their noise')
    if scored is not None:
        figure.add_scatter(
            x=[scored[0]], y=[scored[1]], mode='markers', name='test set (8-bit pixels)',
            marker=dict(size=11, color=COLOURS[1], symbol='diamond'),
        )
    return _html(figure, 'bits', 'step', 'bits per dimension')


def mean_squares(metrics: list[dict], blocks: int) -> str:
    """The mean square of every block's output over steps."""
    figure = go.Figure()
    for b in range(blocks):
        _line(figure, *series(metrics, f'mean_square/block_{b}'), f'block {b}')
    return _html(figure, 'mean-squares', 'step', 'mean square of the output')


def levels(found: dict) -> str:
    """Bits per dimension of noisy images and of the noise alone over the noise level."""
    figure = go.Figure()
    for key, name in (
        ('bits_per_dim', 'noisy test images'), ('noise_bits_per_dim', 'the noise alone'),
    ):
        _line(figure, found['levels'], found[key], name)
    figure.update_xaxes(type='log')
    return _html(figure, 'levels', 'noise level', 'bits per dimension')


def histogram(bits_N) -> str:
    """How the bits per dimension of images are distributed."""
    values = np.asarray(bits_N, float)
    figure = go.Figure()
    figure.add_histogram(
        x=values[np.isfinite(values)].round(5).tolist(), nbinsx=40, marker_color=COLOURS[0],
        name='test images',
    )
    return _html(figure, 'likelihoods', 'bits per dimension', 'images')


def _line(figure, steps, values, name: str) -> None:
    colour = COLOURS[len(figure.data) % len(COLOURS)]
    # Six digits: the page carries them as text.
    values = [float(f'{v:.6g}') if math.isfinite(v) else None for v in values]
    mode = 'lines' if len(steps) > 1 else 'markers'
    figure.add_scatter(x=list(steps), y=values, mode=mode, name=name, line=dict(color=colour))


def _html(figure, name: str, x: str, y: str) -> str:
    figure.update_layout(
        template='plotly_white', height=340, margin=dict(l=56, r=12, t=12, b=48),
        showlegend=figure.data[0].type != 'histogram',
        legend=dict(orientation='h', yanchor='top', y=-0.22, x=0), hovermode='x unified',
        xaxis_title=x, yaxis_title=y, font=dict(size=13),
        paper_bgcolor='rgba(0,0,0,0)', plot_bgcolor='rgba(0,0,0,0)',
    )
    return plotly.io.to_html(
        figure, include_plotlyjs=False, full_html=False, div_id=f'chart-{name}',
        config=dict(displaylogo=False, responsive=True, displayModeBar=False),
    )
