"""The page: well-formed, alone, with alternative text, and whole whatever is missing."""

import html.parser
import re

import numpy as np
import pytest

from tarflow_jax.evaluation.levels import MEANING
from tarflow_jax.evaluation.report import charts, markup, page
from tarflow_jax.flow.guidance import Guidance

VOID = {'meta', 'link', 'img', 'br', 'hr', 'input'}


class Reader(html.parser.HTMLParser):
    """Asserts that all elements are closed in order, and keeps what there is."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], '', []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes['id']] if 'id' in attributes else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {'script', 'style'} & set(self.open):
            self.text += data


def checked(text) -> Reader:
    """What every report must be, whatever it holds."""
    read = Reader(text)
    assert len(text.encode()) < 10e6
    assert len(set(read.ids)) == len(read.ids)
    for tag, attributes in read.tags:
        for name in ('src', 'href', 'srcset', 'action', 'data'):
            if name in attributes:
                assert attributes[name].startswith(('data:', '#')), (tag, attributes[name][:80])
        if tag == 'img':
            assert attributes['alt'].strip()
    style = page.HERE.joinpath('page.css').read_text()
    assert 'url(' not in style and '@import' not in style
    headings = [tag for tag, _ in read.tags if re.fullmatch('h[1-6]', tag)]
    assert headings[0] == 'h1' and headings.count('h1') == 1
    links = {attributes['href'] for tag, attributes in read.tags if tag == 'a'}
    assert headings.count('h2') == len(links)
    assert {link[1:] for link in links} <= set(read.ids)
    return read


def collected(
    classes=3, channels=3, noise_std=0.1, rows=3, columns=2, blocks=2, size=8, levels=(), steps=(),
    moments=4,
):
    """What reporting collects, of numbers without a flow."""
    rng = np.random.default_rng(0)
    images = lambda *shape: rng.uniform(-1.2, 1.2, (*shape, size, size, channels))  # noqa: E731
    pixels = lambda *shape: rng.integers(0, 256, (*shape, size, size, channels), np.uint8)  # noqa: E731
    raw = images(rows, columns)
    found = {
        'labels': np.arange(rows) if classes else None, 'raw': raw,
        'guided': {0.0: raw[:, 0], 2.0: images(rows)}, 'sweep': Guidance(temperature=0.3),
        'trajectory': images(blocks + 1, rows), 'not_finite': 0, 'between': images(rows, 4),
        'moments': images(moments, rows), 'moment_names': [f'moment {i}' for i in range(moments)],
        'iterations': {
            'calls': np.arange(blocks * rows).reshape(blocks, rows),
            'sequential': np.zeros(rows, bool), 'round_trip': np.full(rows, 1e-5),
            'residual': np.zeros((blocks, rows)),
        },
    }
    if noise_std:
        found['denoised'] = images(rows, columns)
    if levels:
        found |= {'film': images(rows, len(levels)), 'film_levels': np.array(levels)}
    return {
        'title': 'Report of <run> & co', 'date': '2000-01-01 00:00 UTC', 'positions': 16,
        'origin': {'name': 'step 12 of run', 'step': 12}, 'noise_std': noise_std, 'lowest_noise_std': noise_std,
        'model': dict(image_size=size, image_channels=channels, patch_size=2, num_classes=classes,
                      layers_per_block=[1] * blocks, width=32),
        'parameters': 12345, 'metrics': [], 'evaluation': None, 'samples': found,
        'guidance': {'weight': 2.0}, 'denoises': bool(noise_std),
        'data': {'train': {'dataset': 'noise', 'images': 700}, 'test': {'images': 20}},
        'class_names': None, 'caution': None,
        'grids': dict(kind='guided', steps=list(steps), frames=[pixels(40) for _ in steps],
                      columns=10, names=None),
        'neighbours': dict(samples=pixels(rows), rows=np.arange(rows), images=pixels(rows, 3),
                           distances=np.full((rows, 3), 7.25), real=np.full(9, 8.5), searched=500,
                           mirrored=True),
        'likelihoods': dict(bits=np.linspace(3, 5, 20), train_bits=np.linspace(2, 4, 20),
                            most=(pixels(4), np.linspace(3, 3.5, 4)),
                            least=(pixels(4), np.linspace(5, 4.5, 4))),
        'blocks': [dict(mean_square=0.5, smallest=-2.0, mean=0.0, largest=1.5)] * blocks,
        'block_images': 20, 'config': {'data': {'path': '<script>alert(1)</script>'}},
        'versions': {'jax': '9.9'}, 'devices': '1 x cpu', 'command': "main --a='<b>'",
    }


def test_names_of_classes_and_a_set_that_the_result_is_not_for():
    found = collected()
    found |= {'class_names': ['ankle boot', 'bag', 'T-shirt'], 'caution': 'the result <is> for x'}
    found['evaluation'] = EVALUATION | {'data': EVALUATION['data'] | {'caution': 'another set'}}
    read = checked(page.page(found))
    alts = ' '.join(a['alt'] for tag, a in read.tags if tag == 'img')
    assert 'ankle boot' in alts and 'class 0' not in alts
    assert 'The result <is> for x.' in read.text and 'Another set.' in read.text


METRICS = [
    {'step': s, 'loss': -0.1 * s, 'prior': 0.5, 'logdet': 0.1 * s, 'skipped': 2.0,
     'mean_square/block_0': 1.0, 'mean_square/block_1': 0.9} for s in (1, 2, 3)
]


def test_lines_of_metrics_that_lack_a_number():
    lines = [*METRICS, {'step': 4, 'prior': 1.0}, {'step': 5, 'logdet': 1.0}, {'step': 6}]
    steps, bits = charts.loss_bits(lines)
    assert steps == [1, 2, 3] and bits.shape == (3,)
    found = collected() | {'metrics': [*lines, {'step': 7, 'loss': 1.0, 'skipped': float('nan')}]}
    assert 'steps were skipped' not in checked(page.page(found)).text


SIDE = dict(max=1e-6, rms=1e-7, not_finite=0.0)
PASSED = dict(
    image_z_image=SIDE, z_image_z=SIDE, blocks=[dict(image_z_image=SIDE, z_image_z=SIDE)],
    logdet_sum=1e-6, bits_per_dim_error=0.0, not_finite=0.0,
)
LEVELS = dict(
    levels=[0.01, 0.3], bits_per_dim=[3.5, 7.5], standard_error_over_images=[0.02, 0.01],
    noise_bits_per_dim=[2.4, 7.3], image_bits_per_dim=[1.1, 0.2],
    image_standard_error_over_images=[0.01, 0.005], images=20, draws=1,
)
EVALUATION = {
    'checkpoint': {'name': 'step 12 of run', 'step': 12},
    'data': {'dataset': 'noise', 'split': 'test', 'images': 20},
    'scores': {
        'bits_per_dim': dict(bits_per_dim=4.5678, standard_error_over_images=0.01, images=20,
                             draws=1, loss=-0.5),
        'round_trip': dict(images=8, float32=PASSED,
                           trusted={'float32': {'sampling': True, 'likelihood': False}}),
    },
}


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
