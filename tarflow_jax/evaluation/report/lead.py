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
        f'Images that the flow made from noise, {how_drawn(found)}: {each}, none picked by hand.'
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
    steps = {one.step for one in picked} - {None}
    title = f'Scores at step {steps.pop():,}' if len(steps) == 1 else 'Scores'
    body = _cards(picked, each_step=bool(steps)) if picked else missing(
        'There are no scores yet; they come with', metrics_flag('bits_per_dim')
    )
    return f'<aside class="scores" aria-label="Scores"><h3>{title}</h3>{body}</aside>'


def _cards(picked: list[headlines.Headline], each_step: bool) -> str:
    """Makes a list of numbers in large type, each over its name."""
    cards = []
    for one in picked:
        kind = '' if one.value[:1].isdigit() else ' class="text"'
        note = f'{one.note}, step {one.step:,}' if each_step and one.step is not None else one.note
        cards.append(
            f'<div{kind}><dt>{html.escape(one.name)} <small>{html.escape(note)}</small></dt>'
            f'<dd>{html.escape(one.value)}</dd></div>'
        )
    return f'<dl class="cards">{"".join(cards)}</dl>'
