"""The top of the report: samples, and a box of scores beside them."""

import html

from tarflow_jax.evaluation.report import headlines
from tarflow_jax.evaluation.report.markup import figure, grid, missing, paragraph, strip
from tarflow_jax.evaluation.report.words import class_name, how_drawn, metrics_flag, warning


def samples(found: dict) -> str:
    """Shows finished samples, row by row, beside the scores."""
    s = found['samples']
    images = s.get('denoised', s['raw'])
    rows, columns = images.shape[:2]
    each = f'{columns} of each class' if s['labels'] is not None else f'{rows * columns} in all'
    text = paragraph(
        f'Images that the flow made from noise, {how_drawn(found)}: {each}, and none of them chosen.'
    ) + warning(s['not_finite'], rows * columns, 'samples')
    figures = [
        figure(name, strip(images[row], alt)) for row, (name, alt) in enumerate(row_names(found))
    ]
    return f'{text}<div class="lead">{grid(figures)}{_scores(found["evaluation"])}</div>'


def row_names(found: dict) -> list[tuple[str, str]]:
    """Returns a name and an alternative text for each row of samples."""
    s = found['samples']
    rows, columns = s['raw'].shape[:2]
    names = [
        class_name(found, row) if s['labels'] is not None else f'row {row + 1}'
        for row in range(rows)
    ]
    return [(name, f'{columns} samples, {name}') for name in names]


def _scores(evaluation: dict | None) -> str:
    picked = headlines.headlines(evaluation)
    if not picked:
        body = missing('There are no scores yet; they come with', metrics_flag('bits_per_dim'))
    else:
        body = cards(picked)
    return f'<aside class="scores" aria-label="Scores"><h3>Scores</h3>{body}</aside>'


def cards(picked: list[headlines.Headline]) -> str:
    """Makes a list of large numbers, each over its name."""
    one = lambda h: (  # noqa: E731
        f'<div><dt>{html.escape(h.name)} <small>{html.escape(h.note)}</small></dt>'
        f'<dd>{html.escape(h.value)}</dd></div>'
    )
    return f'<dl class="cards">{"".join(map(one, picked))}</dl>'
