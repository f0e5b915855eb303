"""Writes the report: the order of its sections, and the template around them."""

import html
import json
import string
from pathlib import Path

from tarflow_jax.data import kinds
from tarflow_jax.evaluation.report import (
    charts,
    lead,
    progress,
    real_images,
    sampling,
    scored,
)
from tarflow_jax.evaluation.report.markup import facts, heading, paragraph
from tarflow_jax.evaluation.report.words import architecture, noise, sentence, set_name

HERE = Path(__file__).parent


def page(found: dict) -> str:
    """Returns the whole page; `found` is what `tarflow_jax.reporting` collects."""
    parts = [(name, title, write(found)) for name, title, write in SECTIONS]
    summary = paragraph(
        f'{found["origin"]["name"]}, trained on {set_name(found["data"]["train"])}. '
        f'Written {found["date"]}.', 'summary',
    ) + sentence(found['caution'])
    return whole(found['title'], summary, parts)


def whole(title: str, summary: str, parts: list[tuple[str, str, str]]) -> str:
    """Puts sections into the template, with styles and scripts: one file that needs no network.

    Args:
      summary: HTML.
      parts: (id, title, HTML) of each section; those without HTML are left out.
    """
    parts = [part for part in parts if part[2]]
    text = lambda name: (HERE / name).read_text(encoding='utf-8')  # noqa: E731
    return string.Template(text('page.html')).substitute(
        title=html.escape(title),
        style=text('page.css'),
        library=charts.script(),
        script=text('page.js'),
        summary=summary,
        contents=''.join(f'<li><a href="#{n}">{html.escape(t)}</a></li>' for n, t, _ in parts),
        sections='\n'.join(
            f'<section id="{n}" aria-labelledby="{n}-title"><h2 '
            f'id="{n}-title">{html.escape(t)}</h2>\n{body}</section>' for n, t, body in parts
        ),
    )


def _model(found) -> str:
    train = found['data']['train']
    return paragraph(
        'This model is a normalizing flow, an exactly invertible function between images and '
        'Gaussian noise. Forward, it gives the probability of an image. Backward, it makes images '
        'out of noise.'
    ) + facts({
        'Checkpoint': found['origin']['name'],
        'Flow': architecture(found['model'], found['parameters']),
        'Trained on': set_name(train),
        'Tested on': set_name(found['data']['test']),
        'Kind of images': kinds.described(train.get('kind')),
        'Noise of training': noise(found),
    })


def _made(found) -> str:
    versions = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
    return (
        paragraph('All it takes to make this page again, given the checkpoint and the data.')
        + heading('Command') + f'<pre>{html.escape(found["command"])}</pre>'
        + heading('Versions') + paragraph(versions)
        + heading('Devices') + paragraph(found['devices'])
        + heading('Config') + '<details><summary>All fields, as JSON</summary>'
        f'<pre>{html.escape(json.dumps(found["config"], indent=2, default=str))}</pre></details>'
    )


SECTIONS = (
    ('samples', 'Samples', lead.samples),
    ('model', 'The model', _model),
    ('training', 'Training', progress.training),
    ('steps', 'Samples during training', progress.steps),
    ('sampling', 'From noise to image', sampling.noise_to_image),
    ('denoising', 'Denoising', sampling.denoising),
    ('guidance', 'Guidance', sampling.guidance),
    ('between', 'Between two samples', sampling.between),
    ('neighbours', 'Nearest training images', real_images.neighbours),
    ('likelihoods', 'Likelihoods', real_images.likelihoods),
    ('classification', 'Classification', scored.classification),
    ('blocks', 'Blocks', scored.blocks),
    ('scores', 'All scores', scored.scores),
    ('made', 'How this page was made', _made),
)
