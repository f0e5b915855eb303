"""Writes the page that compares several runs, from what each has kept; computes nothing again."""

import dataclasses

from tarflow_jax.evaluation.report import charts, headlines, page, timeline
from tarflow_jax.evaluation.report.markup import (
    figure,
    grid,
    missing,
    paragraph,
    picture,
    table,
)
from tarflow_jax.evaluation.report.progress import AXIS
from tarflow_jax.evaluation.report.words import architecture, how_drawn, noise, set_name


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of one run.

    Args:
      name: a short one that no other run has.
      workdir: as text, for commands.
      metrics: the lines of metrics.jsonl.
      evaluation: see `scoring.read`; None without.
      kept: see `kept.read`; None where no report was written.
    """

    name: str
    workdir: str
    metrics: list[dict]
    evaluation: dict | None
    kept: dict | None


def compare(runs: list[Run], date: str) -> str:
    """Returns the page of two runs or more."""
    names = [run.name for run in runs]
    summary = paragraph(f'{len(runs)} runs side by side. Written {date}.', 'summary')
    title = f'Comparison of {", ".join(names[:-1])} and {names[-1]}'
    return page.whole(title, summary, [
        ('samples', 'Samples', _samples(runs)),
        ('scores', 'Scores', _scores(runs)),
        ('training', 'Training', _training(runs)),
        ('runs', 'The runs', _runs(runs)),
    ])


def _unwritten(run: Run) -> str:
    return missing(f'{run.name}: its samples are not kept. They are once its report is written:',
                   f'--mode=report --workdir={run.workdir}')


def _samples(runs: list[Run]) -> str:
    text = paragraph('Samples of each run, none picked by hand. The noise is the same where the '
                     'flows take noise of the same shape and the runs have the same seed.')
    text += ''.join(
        paragraph(f'{run.name}: drawn {how_drawn(run.kept)}, {run.kept["origin"]["name"]}.')
        if run.kept else _unwritten(run) for run in runs
    )
    kept = [run for run in runs if run.kept]
    names = {one['name']: None for run in kept for one in run.kept['samples']}  # in order
    for name in names:
        figures = [
            figure(name, picture(
                one['picture'], f'{run.name}: {one["alt"]}', one['width'], one['height'],
                run.kept['columns'],
            ), lead=run.name)
            for run in kept for one in run.kept['samples'] if one['name'] == name
        ]
        text += grid(figures, 'small side')
    return text


def _scores(runs: list[Run]) -> str:
    found = [headlines.headlines(run.evaluation) for run in runs]
    names = {one.name: None for own in found for one in own}
    if not names:
        return missing('No run has scores yet. They come with',
                       f'--mode=evaluate --workdir={runs[0].workdir}')
    rows = []
    for name in names:
        cells = [
            next((_cell(one) for one in own if one.name == name), 'not scored') for own in found
        ]
        rows.append([name, *cells])
    sets = {set_name(run.evaluation['data']) for run in runs if run.evaluation}
    text = paragraph('From the evaluation.json of each run.')
    if len(sets) > 1:
        text += paragraph(
            f'The runs were scored on different sets ({"; ".join(sorted(sets))}): do not compare '
            'their numbers.', 'warning',
        )
    return text + table(['', *(run.name for run in runs)], rows, 'Scores of each run')


def _cell(one: headlines.Headline) -> str:
    step = '' if one.step is None else f', step {one.step:,}'
    return f'{one.value} ({one.note}{step})'


def _training(runs: list[Run]) -> str:
    metrics = [run.metrics for run in runs]
    losses, bits = [], []
    for i, run in enumerate(runs):
        held_out = charts.series(run.metrics, 'validation/loss')
        losses.append((i, *charts.series(run.metrics, 'loss'), run.name, False))
        bits.append((i, *charts.loss_bits(run.metrics), run.name, False))
        if held_out[0]:
            losses.append((i, *held_out, f'{run.name}, held-out', True))
            bits.append((i, *charts.series(run.metrics, 'validation/bits_per_dim'),
                         f'{run.name}, held-out', True))
    losses, bits = ([line for line in lines if len(line[1])] for lines in (losses, bits))
    if not losses:
        return missing('No run has curves: metrics.jsonl is missing or holds no loss.')
    text = paragraph(
        'Full lines are training batches, dashed ones held-out images. Compare losses of runs with '
        'the same noise of training only; the bits per dimension of training batches are for noisy '
        'images, too.'
    )
    text += AXIS if all(len(timeline.hours(one)[0]) for one in metrics) else ''
    loss = charts.runs('losses', 'step', 'loss, nats per dimension', losses, metrics)
    return text + grid([
        figure('', loss, lead='Loss'),
        figure('', charts.runs('bits', 'step', 'bits per dimension', bits, metrics),
               lead='Bits per dimension'),
    ], 'charts')


def _runs(runs: list[Run]) -> str:
    kept = [run.kept for run in runs]
    rows = [
        ['checkpoint', *(k['origin']['name'] if k else 'unknown' for k in kept)],
        ['flow', *(architecture(k['model'], k['parameters']) if k else 'unknown' for k in kept)],
        ['trained on', *(set_name(k['train']) if k else 'unknown' for k in kept)],
        ['noise of training', *(noise(k) if k else 'unknown' for k in kept)],
        ['report written', *(k['date'] if k else 'not yet' for k in kept)],
    ]
    return table(['', *(run.name for run in runs)], rows, 'What each run is')
