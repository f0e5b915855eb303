"""The sections of the report, from what was computed; each says what its reader is looking at."""

import html
import json
import string
from pathlib import Path

import numpy as np

from tarflow_jax.data import kinds, sizes
from tarflow_jax.evaluation.levels import MEANING
from tarflow_jax.evaluation.report import charts
from tarflow_jax.evaluation.report.markup import (
    figure,
    grid,
    missing,
    number,
    own_scale,
    paragraph,
    pictures_of,
    strip,
    table,
)
from tarflow_jax.evaluation.scores import SCORES

HERE = Path(__file__).parent
TRAJECTORIES = 4
EVALUATE = '--mode=evaluate'


def page(found: dict) -> str:
    """The whole page; `found` is what `tarflow_jax.reporting` collects."""
    parts = [(name, title, write(found)) for name, title, write in SECTIONS]
    parts = [part for part in parts if part[2]]
    template = string.Template((HERE / 'page.html').read_text(encoding='utf-8'))
    return template.substitute(
        title=html.escape(found['title']),
        style=(HERE / 'page.css').read_text(encoding='utf-8'),
        script=charts.script(),
        summary=_summary(found),
        contents=''.join(f'<li><a href="#{n}">{html.escape(t)}</a></li>' for n, t, _ in parts),
        sections='\n'.join(
            f'<section id="{n}" aria-labelledby="{n}-title"><h2 id="{n}-title">{html.escape(t)}</h2>\n'
            f'{body}</section>' for n, t, body in parts
        ),
    )


def _sides(size) -> str:
    """Such as '64x64', of what `flow.architecture` says of a size."""
    return 'x'.join(map(str, sizes.pair(size)))


def _summary(found) -> str:
    m = found['model']
    depths = ' + '.join(map(str, m['layers_per_block']))
    classes = f'{m["num_classes"]} classes' if m['num_classes'] else 'no classes'
    low, high = found['lowest_noise_std'], found['noise_std']
    noise = (
        f'Gaussian, standard deviation {high:g} where images span -1 to 1' if low == high
        else f'Gaussian, standard deviations {low:g} to {high:g} where images span -1 to 1'
    ) if high else 'uniform, within the step between two grey levels'
    facts = {
        'Checkpoint': found['origin']['name'],
        'Trained on': _set_name(found['data']['train']),
        'Kind of images': kinds.described(found['data']['train'].get('kind')),
        'Flow': (
            f'{_sides(m["image_size"])} pixels, {m["image_channels"]} channel(s), patches of '
            f'{_sides(m["patch_size"])}, {len(m["layers_per_block"])} blocks of {depths} '
            f'layers, width {m["width"]}, {classes}, {found["parameters"]:,} parameters'
        ),
        'Noise in training': noise,
        'Made': found['date'],
    }
    items = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in facts.items())
    return paragraph(
        'This model is a normalizing flow: a function with an exact inverse that turns images into '
        'Gaussian noise. Run forwards it says how probable an image is; run backwards it makes '
        'images out of noise.'
    ) + f'<dl>{items}</dl>' + _caution(found['caution'])


def _caution(sentence: str | None) -> str:
    return paragraph(f'{sentence[:1].upper()}{sentence[1:]}.', 'warning') if sentence else ''


def _set_name(about) -> str:
    return f'{about.get("dataset", "?")}, split {about.get("split", "?")}, {about["images"]:,} images'


def _training(found) -> str:
    metrics = found['metrics']
    if not any('loss' in line for line in metrics):
        return missing(
            'metrics.jsonl is missing here or holds no loss, so that there is no curve; it is '
            'written in training, by', '--mode=train',
        )
    evaluation = found['evaluation'] or {'scores': {}}
    scores = evaluation['scores'].get('bits_per_dim')
    step = scores and scores.get('from', evaluation)['checkpoint'].get('step')
    scored = (step, scores['bits_per_dim']) if step is not None else None
    text = paragraph(
        'The loss is how badly the flow predicts its training images, smaller being better, and it '
        'is a sum: the prior term asks the latents to be small, as Gaussian noise is, and the '
        'log-determinant is charged for having squeezed the image to get there. A prior term near '
        '0.5 means latents of the right size.'
    )
    if 'film' in found['drawn']:
        text += paragraph(
            'Here the loss of each image is multiplied by a weight that depends on its noise level. '
            'The two terms, and the second chart, are without it.'
        )
    noise = (
        'This flow was trained on images with Gaussian noise, so that the line is for noisy images; '
        'it compares runs of the same noise, and neither with published numbers nor with the test set.'
        if found['noise_std'] else
        'With uniform noise the line and the score of the test set mean the same.'
    )
    text += paragraph(
        'The second chart has the same loss in bits per dimension: how many bits a number of an image would cost if the '
        f'flow were used to compress it. {noise}'
    )
    text += grid([
        figure('Loss and its two terms over training', charts.losses(metrics)),
        figure('Bits per dimension over training', charts.bits(metrics, scored)),
    ])
    _, skipped = charts.series(metrics, 'skipped')
    if skipped and skipped[-1] > 0:
        text += paragraph(
            f'{skipped[-1]:,.0f} steps were skipped, as their gradient was not finite.',
            'warning',
        )
    if scored is None:
        text += missing('The score of the test set is missing; it comes with', EVALUATE)
    return text


def _class(found, row: int) -> str:
    labels, names = found['drawn']['labels'], found['class_names']
    if labels is None:
        return f'sample {row + 1}'
    return f'class {labels[row]}' if names is None else names[labels[row]]


def _not_finite(images) -> int:
    return int((~np.isfinite(images).reshape(*images.shape[:-3], -1).all(-1)).sum())


def _warned(count: int, total: int, what: str) -> str:
    if not count:
        return ''
    return paragraph(
        f'{count} of {total} {what} are not finite: numbers grew past what the computer holds on '
        'the way. They show in grey or as noise here; --mode=sample draws such images again.',
        'warning',
    )


def _samples(found) -> str:
    drawn, labels = found['drawn'], found['drawn']['labels']
    raw, clean = drawn['raw'], drawn.get('denoised')
    rows, columns = raw.shape[:2]
    text = 'Images that the flow made from noise, none of them chosen'
    text += f', {columns} for each class shown. ' if labels is not None else '. '
    if clean is not None:
        steps = 'steps from noise level to noise level' if 'film' in drawn else 'one step'
        text += (
            'The flow learned from noisy images, so that its samples are noisy, too (first). The '
            f'gradient of its own likelihood points to where the clean image is, and {steps} along '
            'it removes the noise (second).'
        )
    text = paragraph(text) + _warned(drawn['not_finite'], rows * columns, 'samples')
    figures = []
    for row in range(rows):
        name = _class(found, row) if labels is not None else f'row {row + 1}'
        alt = f'{columns} samples, {name}'
        if clean is None:
            figures.append(pictures_of(name, raw[row], alt))
            continue
        both = strip(raw[row], f'{alt}, as drawn'), strip(clean[row], f'The same {alt}, denoised')
        figures.append(figure('as drawn, then denoised', *both, lead=name))
    return text + grid(figures)


def _film(found) -> str:
    drawn = found['drawn']
    if 'film' not in drawn:
        return ''
    levels = [f'{level:.2g}' for level in drawn['film_levels']]
    text = paragraph(
        'This flow knows many noise levels. The first picture of each row is a sample as drawn, at the '
        f'highest level, {levels[0]}; the others follow it down, step by step along the gradient of '
        'the likelihood at each level, to the finished image. The sample settles what the picture '
        'shows, and the way down clears its noise; noise that stays to the end points to a flow '
        'that has not learned its levels yet.'
    )
    film = drawn['film']
    rows = ', '.join(_class(found, row) for row in range(len(film)))
    alt = f'{len(film)} samples ({rows}), each at {len(levels)} noise levels from {levels[0]} to 0'
    return text + pictures_of(
        'Noise levels', film.reshape(-1, *film.shape[2:]), alt, ', '.join(levels), len(levels)
    )


def _guidance(found) -> str:
    drawn, guidance, labels = found['drawn'], found['drawn']['guidance'], found['drawn']['labels']
    weaker = 'the same prediction without knowing the class' if labels is not None else (
        f'the same prediction with its attention blurred (temperature {guidance.temperature:g})'
    )
    text = paragraph(
        f'Guidance exaggerates what a prediction has more of than {weaker}. A larger weight gives '
        'clearer and less varied images, and too large a weight breaks them. All of these begin '
        'from the same noise, that of the first sample of each row above.'
    )
    figures, bad, total = [], 0, 0
    for weight, images in drawn['guided'].items():
        name = f'weight {weight:g}' if weight else 'weight 0 (no guidance)'
        bad, total = bad + _not_finite(images), total + len(images)
        alt = f'{len(images)} samples from the same noise with guidance {name}'
        figures.append(pictures_of(name, images, alt, columns=min(len(images), 5)))
    settings = f'target {guidance.target}, rule {guidance.rule}'
    settings += ', growing along the sequence' if guidance.annealed else ''
    text += _warned(bad, total, 'of these')
    text += paragraph(f'Fields of the guidance beside the weight: {settings}.')
    return text + grid(figures, 'tiny')


def _trajectory(found) -> str:
    drawn = found['drawn']
    way, clean = drawn['trajectory'], drawn.get('denoised')
    blocks = len(way) - 1
    end = ', and the denoised image' if clean is not None else ''
    text = paragraph(
        f'Sampling undoes the {blocks} blocks of the flow one after another, the last first. From '
        f'left to right: the noise, then what is there after each block{end}. Pictures before the '
        'image are each brightened or darkened to fit, as their numbers are not colours yet. Where '
        'much of the image appears in one step, that block does much of the work.'
    )
    frames = [own_scale(x) for x in way[:-1]] + [way[-1]]
    figures = []
    for row in range(min(TRAJECTORIES, way.shape[1])):
        shown = [x[row] for x in frames] + ([] if clean is None else [clean[row, 0]])
        name = _class(found, row)
        alt = f'The way from noise to image in {len(shown)} pictures, {name}'
        figures.append(pictures_of(name, np.stack(shown), alt))
    return text + grid(figures)


def _between(found) -> str:
    images = found['drawn']['between']
    if not len(images):
        return missing('There is one sample in a row and none to go to; ask for more by',
                       '--config.report.columns=2')
    text = paragraph(
        'The ends of each row are two samples; between them the noise they were made from is '
        'turned, in equal steps, from the first to the second, along an arc that keeps it as long '
        'as noise is. A flow that has learned what images have in common shows images all along; '
        'two pictures faded into each other would point to one that has not.'
    )
    figures = []
    for row, way in enumerate(images):
        name = _class(found, row)
        alt = f'{len(way)} pictures from one sample to another, {name}'
        figures.append(pictures_of(name, way, alt))
    warned = _warned(_not_finite(images), images.shape[0] * images.shape[1], 'of these')
    return text + warned + grid(figures)


def _neighbours(found) -> str:
    near = found['neighbours']
    searched = f'{near["searched"]:,} of {found["data"]["train"]["images"]:,}'
    text = paragraph(
        'Has the flow learned its training images by heart? Behind each sample, the first picture '
        f'of a row, are the training images that differ least from it, pixel by pixel, among {searched} evenly spaced ones'
        f'{" and their mirror images" if near["mirrored"] else ""}. The distance is the usual '
        'difference of a pixel (root mean square, of 256 grey levels): 0 would be a copy.'
    )
    if not len(near['samples']):
        return text + paragraph('None of the samples is finite, so that none was compared.', 'warning')
    ours, real = np.median(near['distances'][:, 0]), np.median(near['real'])
    verdict = (
        'Samples are much nearer to it than unseen images are: look at the pairs for copies.'
        if ours < 0.5 * real else 'Samples are not unusually near to it.'
    )
    text += paragraph(
        f'Half of the samples here are within {ours:.1f} grey levels of their nearest training '
        f'image, and half of {len(near["real"])} real test images within {real:.1f} of theirs. '
        f'{verdict} Smooth or dark pictures are near to many others, and copies that are shifted '
        'or of images outside the search are not found this way.'
    )
    figures = []
    for i, sample in enumerate(near['samples']):
        name = _class(found, near['rows'][i])
        distances = ', '.join(f'{x:.1f}' for x in near['distances'][i])
        alt = f'A sample, {name}, and its {near["images"].shape[1]} nearest training images'
        shown = np.stack([sample, *near['images'][i]])
        figures.append(pictures_of(name, shown, alt, f'distances {distances}'))
    return text + grid(figures, 'small')


def _likelihoods(found) -> str:
    likely = found['likelihoods']
    bits = likely['bits']
    text = paragraph(
        f'The flow gives every image a probability; in bits per dimension, fewer are more probable. '
        f'Of {len(bits):,} evenly spaced test images, these are the extremes. Plain and smooth '
        'images are probable whatever they show, so that this ranks how hard an image is to '
        'predict and not how typical it is.'
    )
    lost = int((~np.isfinite(bits)).sum())
    text += _warned(lost, len(bits), 'likelihoods') if lost else ''
    figures = []
    for key, title in (('most', 'Most likely'), ('least', 'Least likely')):
        images, own = likely[key]
        if not len(images):
            continue
        alt = f'The {len(images)} {title.lower()} test images'
        caption = f'from {number(float(own[0]))} to {number(float(own[-1]))} bits/dim'
        figures.append(pictures_of(title, images, alt, caption, min(len(images), 6)))
    spread = figure('Bits per dimension of these test images', charts.histogram(bits))
    return text + grid(figures) + spread


def _blocks(found) -> str:
    calls, positions = found['drawn']['iterations'], found['positions']
    text = paragraph(
        'Each block predicts a patch of the image from those before it, as a shift and a '
        'log-scale, and takes both out. The mean square of its output shows how much is left (1 is '
        'that of noise). A log-scale far from 0 stretches or shrinks numbers greatly, and rounding '
        'errors with them.'
    )
    text += paragraph(
        f'Undone patch by patch, a block takes {positions - 1} network calls in a row. Parallel '
        'decoding (Jacobi) guesses all patches at once and corrects the guess until it stays the '
        'same; blocks that need few calls are those in which patches hardly depend on each other.'
    )
    rows = [
        [f'block {b}', one['mean_square'], one['smallest'], one['mean'], one['largest'],
         float(calls['calls'][b].mean()), int(calls['calls'][b].max())]
        for b, one in enumerate(found['blocks'])
    ]
    head = ['', 'mean square', 'smallest log-scale', 'mean', 'largest', 'Jacobi calls, mean', 'most']
    text += table(head, rows, f'Of {found["block_images"]} test images with the noise of training, and '
                  f'of {calls["calls"].shape[1]} samples decoded in parallel')
    failed = int(calls['sequential'].sum())
    if failed:
        text += paragraph(
            f'{failed} of these samples did not settle in parallel and were drawn one patch after '
            'another, which counts as so many calls.', 'warning',
        )
    text += paragraph(
        f'Taken back by the flow, these samples give the noise they were made from to within '
        f'{number(float(calls["round_trip"].max()))} (noise has standard deviation 1).'
    )
    if any('mean_square/block_0' in line for line in found['metrics']):
        chart = charts.mean_squares(found['metrics'], len(found['blocks']))
        text += figure('Mean square of the output of each block over training', chart)
    return text


def _scores(found) -> str:
    report = found['evaluation']
    if report is None:
        return missing('evaluation.json is missing here; scores and the certificate come with',
                       f"{EVALUATE} --config.evaluate.metrics='(\"bits_per_dim\",\"round_trip\")'")
    text = paragraph(
        f'From evaluation.json, of {report["checkpoint"]["name"]}, on {_set_name(report["data"])}.'
    ) + _caution(report['data'].get('caution'))
    if report['checkpoint'] != found['origin']:
        text += paragraph('This is not the checkpoint that the rest of the page shows.', 'warning')
    scores = dict(report['scores'])
    certificate = scores.pop('round_trip', None)
    for name, result in scores.items():
        text += table([], SCORES[name].rows(result), name.replace('_', ' '))
        if name == 'levels':
            text += paragraph(MEANING) + figure('Bits per dimension at noise levels',
                                                charts.levels(result))
    if 'film' in found['drawn'] and 'levels' not in scores:
        text += missing('How the likelihood changes with the noise level is missing here; it comes '
                        'with', f"{EVALUATE} --config.evaluate.metrics='(\"levels\",)'")
    text += '<h3>Certificate</h3>' + paragraph(
        'On paper a flow can be undone exactly; a computer rounds, and a flow that stretches much '
        'can lose all digits. The certificate measures what is lost in going through the flow and '
        'back.'
    )
    if certificate is None:
        return text + missing('It is missing here; it comes with',
                              f"{EVALUATE} --config.evaluate.metrics='(\"round_trip\",)'")
    rows = SCORES['round_trip'].rows(certificate)
    return text + table([], rows, 'image -> z -> image and z -> image -> z')


def _made(found) -> str:
    versions = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
    return (
        paragraph('What it takes to make this page again, given the checkpoint and the data.') +
        f'<h3>Command</h3><pre>{html.escape(found["command"])}</pre>'
        f'<h3>Versions</h3>{paragraph(versions)}'
        f'<h3>Devices</h3>{paragraph(found["devices"])}'
        '<h3>Config</h3><details><summary>All fields, as JSON</summary>'
        f'<pre>{html.escape(json.dumps(found["config"], indent=2, default=str))}</pre></details>'
    )


SECTIONS = (
    ('training', 'Training', _training),
    ('samples', 'Samples', _samples),
    ('film', 'Down the noise levels', _film),
    ('guidance', 'Guidance', _guidance),
    ('trajectory', 'From noise to image', _trajectory),
    ('between', 'Between two samples', _between),
    ('neighbours', 'Nearest training images', _neighbours),
    ('likelihoods', 'Most and least likely', _likelihoods),
    ('blocks', 'Blocks', _blocks),
    ('scores', 'Scores', _scores),
    ('made', 'How it was made', _made),
)
