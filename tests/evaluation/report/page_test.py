"""The page: well-formed, alone, with alternative text, and whole whatever is missing."""

import json
import re

import numpy as np
import pytest
from report_pages import EVALUATION, LEVELS, METRICS, checked, collected

from tarflow_jax.evaluation.levels import MEANING
from tarflow_jax.evaluation.report import charts, grids, markup, page, samples


def test_names_of_classes_and_a_set_that_the_result_is_not_for():
    found = collected()
    found |= {'class_names': ['ankle boot', 'bag', 'T-shirt'], 'caution': 'the result <is> for x'}
    found['evaluation'] = EVALUATION | {'data': EVALUATION['data'] | {'caution': 'another set'}}
    read = checked(page.page(found))
    alts = ' '.join(a['alt'] for tag, a in read.tags if tag == 'img')
    assert 'ankle boot' in alts and 'class 0' not in alts
    assert 'The result <is> for x.' in read.text and 'Another set.' in read.text


def test_lines_of_metrics_that_lack_a_number():
    lines = [*METRICS, {'step': 4, 'prior': 1.0}, {'step': 5, 'logdet': 1.0}, {'step': 6}]
    steps, bits = charts.loss_bits(lines)
    assert steps == [1, 2, 3] and bits.shape == (3,)
    found = collected() | {'metrics': [*lines, {'step': 7, 'loss': 1.0, 'skipped': float('nan')}]}
    assert 'steps were skipped' not in checked(page.page(found)).text


@pytest.mark.parametrize('fields', [
    {}, dict(classes=0), dict(channels=1), dict(classes=0, noise_std=0.0, channels=1, rows=1),
    dict(size=96, rows=1),
])
def test_pages_of_all_kinds_of_flows(fields):
    found = collected(**fields)
    read = checked(page.page(found))
    rows = len(found['samples']['raw'])
    images = [a for tag, a in read.tags if tag == 'img']
    # Samples, the film, trajectories, the sweep, ways between, neighbours, two sets of extremes,
    # and where there is noise to remove one picture before and one after.
    assert len(images) == 5 * rows - rows + 1 + 2 + 2 + 2 * bool(found['noise_std'])
    assert ('class 0' in ' '.join(a['alt'] for a in images)) == bool(found['model']['num_classes'])
    assert 'Report of <run> & co' in read.text
    assert '12,345 parameters' in read.text
    assert '500 of 700' in read.text and 'within 7.2 grey levels' in read.text


def test_what_is_missing_is_named_with_its_command():
    found = collected()
    text = checked(page.page(found)).text
    assert 'metrics.jsonl is missing' in text and '--mode=train' in text
    assert 'evaluation.json is missing' in text and '--mode=evaluate' in text
    found |= {'metrics': METRICS, 'evaluation': EVALUATION}
    whole = page.page(found)
    text = checked(whole).text
    assert 'missing' not in text
    assert '4.5678' in text and 'float32 can be trusted for' in text and 'likelihood NO' in text
    assert '2 steps were skipped' in text
    assert whole.count('<div class="chart"') == 5
    text = checked(page.page(found | {'origin': {'name': 'step 13 of run', 'step': 13}})).text
    assert 'shows another checkpoint' in text


def test_a_flow_of_many_noise_levels():
    found = collected(levels=(0.3, 0.155, 0.01, 0.0))
    read = checked(page.page(found))
    titles = ' '.join(a['alt'] for tag, a in read.tags if tag == 'img')
    assert '3 samples (class 0, class 1, class 2), each at 4 noise levels from 0.3 to 0' in titles
    assert 'This flow knows many noise levels' in read.text
    assert 'This flow knows' not in checked(page.page(collected())).text
    scores = EVALUATION['scores'] | {'levels': LEVELS}
    found |= {'evaluation': EVALUATION | {'scores': scores}, 'metrics': METRICS}
    text = page.page(found)
    assert MEANING in text and 'multiplied by a weight' in text and 'missing' not in checked(text).text
    assert 'chart-levels' in text and '"log": true' in text
    found['evaluation'] = EVALUATION
    assert 'metrics=\'("levels",)\'' in checked(page.page(found)).text


def test_text_from_outside_is_escaped():
    text = page.page(collected())
    assert '<script>alert' not in text and '<b>' not in text
    assert '&lt;script&gt;alert' in text


def test_images_that_are_not_finite():
    found = collected()
    raw = found['samples']['raw']
    raw[0] = np.nan
    raw[1, 0, 0, 0, 0] = np.inf
    found['samples']['not_finite'] = 3
    found['samples']['trajectory'][:] = np.nan
    found['likelihoods']['bits'][:2] = np.nan
    found['neighbours'] |= {
        name: found['neighbours'][name][:0] for name in ('samples', 'rows', 'images', 'distances')
    }
    text = checked(page.page(found)).text
    assert '3 of 6 samples are not finite' in text
    assert '2 of 20 likelihoods are not finite' in text
    assert 'No sample is finite' in text


def test_copies_are_called_out():
    found = collected()
    found['neighbours']['distances'][:] = 1.0
    assert 'look at the pairs for copies' in checked(page.page(found)).text


def test_losses_as_bits():
    # 0 nats under a unit Gaussian whose constant was left out; 128 steps to a unit.
    terms = {'step': 3, 'loss': 0.2, 'prior': 0.5, 'logdet': 0.5}  # a loss with weights
    steps, bits = charts.loss_bits([terms, {'step': 4, 'samples/redraws': 0}])
    assert steps == [3]
    assert bits == pytest.approx([np.log2(128) + 0.5 * np.log2(2 * np.pi)], rel=1e-6)


def test_large_pictures_are_shrunk():
    strip = markup.strip(np.zeros((2, 256, 256, 3)), 'two')
    width = 2 * markup.LARGEST_SIDE + 2
    assert f'width="{width}" height="{markup.LARGEST_SIDE}"' in strip


def test_many_steps_do_not_fill_the_page():
    # Noise in colour, which is the worst to compress, of as many steps as are shown.
    grid, steps = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8), range(16)
    assert len(steps) == grids.MOST_STEPS
    found = collected(rows=1)
    found['grids'] |= {'steps': [*steps], 'frames': [np.roll(grid, s) for s in steps]}
    [uri] = re.findall('class="film".*?src="data:image/jpeg;base64,(.*?)"', page.progress.steps(found))
    assert len(uri) <= markup.LARGEST_JPEG * 4 / 3 + 4


@pytest.mark.slow
def test_a_page_with_everything_stays_below_ten_megabytes():
    # Noise everywhere: large pictures in colour, many steps, blocks, moments and levels.
    found = collected(
        size=markup.LARGEST_SIDE, rows=10, columns=6, blocks=8, levels=np.linspace(1, 0, 24),
        steps=range(1, grids.MOST_STEPS + 1), moments=samples.MOST_MOMENTS,
    )
    found['metrics'] = [line | {'step': s} for s in range(20_000) for line in METRICS[:1]]
    assert 7e6 < len(page.page(found).encode()) < 10e6


def test_the_curves_of_a_long_run_are_thinned():
    metrics = [{'step': s, 'loss': float(s)} for s in range(20_001)]
    [chart] = re.findall(r'<script type="application/json">(.*?)</script>', charts.losses(metrics))
    [trace] = json.loads(chart)['traces']
    assert 1000 < len(trace['x']) <= charts.MOST_POINTS
    assert trace['x'] == trace['y'] and trace['x'][0] == 0


def test_films_show_a_frame_without_javascript():
    found = collected(steps=(100, 200, 300), moments=5)
    found['grids']['names'] = ['shirt', 'bag']
    found['metrics'] = [
        line | {'step': s, 'wall_time': 1e9 + 36 * s, 'images_per_second': 1.0}
        for s in range(10, 301, 10) for line in METRICS[:1]
    ]
    read = checked(page.page(found))
    films = [a for tag, a in read.tags if tag == 'div' and a.get('class') == 'film']
    assert json.loads(films[0]['data-labels']) == [
        'step 100, after 1.0 h', 'step 200, after 2.0 h', 'step 300, after 3.0 h',
    ]
    sliders = [a for tag, a in read.tags if tag == 'input' and a['type'] == 'range']
    assert [(s['max'], s['value']) for s in sliders] == [('2', '2'), ('5', '5')]
    assert all(s['aria-label'] for s in sliders)
    shown = [a['style'] for tag, a in read.tags if tag == 'img' and 'translateY' in a['style']]
    assert shown[0] == 'transform:translateY(-66.6667%)'
    assert 'step 300, after 3.0 h' in read.text and 'shirt, bag' in read.text
    # Each frame has a gap below it, so that the whole is as high as its frames and their gaps.
    [stage] = [a for tag, a in read.tags if a.get('style', '').startswith('aspect-ratio:98/38')]
    [film] = [a for tag, a in read.tags if tag == 'img' and a['width'] == '98' and 'translateY' in a['style']]
    assert int(film['height']) == 3 * (38 + 2) and stage


def test_validation_is_charted_where_it_is_there():
    lines = [line | {'wall_time': 1e9 + line['step'], 'images_per_second': 1.0} for line in METRICS]
    validation = [
        {'step': s, 'wall_time': 1e9 + s, 'validation/loss': loss, 'validation/train_loss': 0.1,
         'validation/bits_per_dim': 4.0, 'validation/train_bits_per_dim': 3.9}
        for s, loss in ((1, 0.5), (2, 0.25), (3, float('nan')))
    ]
    text = page.page(collected() | {'metrics': lines + validation})
    assert 'held-out loss is lowest at step 2: 0.25' in checked(text).text
    assert text.count('held-out images"') == 2 and 'name="axis"' in text
    text = page.page(collected() | {'metrics': METRICS})
    assert 'held-out' not in text and 'name="axis"' not in text


CLASSIFICATION = dict(
    accuracy=0.75, accuracy_standard_error=0.1, confidence=0.9, calibration_error=0.15,
    calibration_error_at_temperature=0.05, temperature=3.0, images=20, draws=1,
    reliability=[[0.5, 0.25, 4.0], [0.95, 0.9, 16.0]],
)


@pytest.mark.parametrize('classes', [3, 30])
def test_calibration_and_confusion(classes):
    counts = np.diag(np.full(classes, 5))
    counts[0, 2] = 4
    matrix = {'classes': [f'<{k}>' for k in range(classes)], 'counts': counts.tolist()}
    scores = {'classification': CLASSIFICATION | {'confusion': matrix}}
    found = collected() | {'evaluation': EVALUATION | {'scores': scores}}
    text = page.page(found)
    read = checked(text)
    assert 'The most frequent mistakes: <0> as <2> (4).' in read.text
    assert '75.0%' in read.text and 'chart-calibration' in text
    # Few classes are a table, many a chart.
    cells = [a for tag, a in read.tags if tag == 'td' and '--share' in a.get('style', '')]
    assert len(cells) == (9 if classes == 3 else 0) and ('chart-confusion' in text) == (classes == 30)
    found['evaluation'] = EVALUATION | {'scores': {'classification': CLASSIFICATION}}
    assert 'The confusion matrix is missing' in checked(page.page(found)).text


def test_scores_of_several_checkpoints():
    earlier = {'checkpoint': {'name': 'step 6 of run', 'step': 6}}
    scores = EVALUATION['scores'] | {'classification': CLASSIFICATION | {'from': earlier}}
    text = checked(page.page(collected() | {'evaluation': EVALUATION | {'scores': scores}})).text
    assert '20 test images, step 6' in text and '20 test images, step 12' in text
    assert 'Scores at step 12' in checked(page.page(collected() | {'evaluation': EVALUATION})).text


def test_memorized_training_images_show():
    found = collected()
    assert 'Unseen images cost more' in checked(page.page(found)).text
    found['likelihoods']['train_bits'] = found['likelihoods']['bits']
    assert 'Nothing here shows that the flow has memorized' in checked(page.page(found)).text
