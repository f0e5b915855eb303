"""What reporting collects, without a flow, and what every page must be."""

import html.parser
import re

import numpy as np

from tarflow_jax.evaluation.report import page
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
) -> dict:
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
    if len(levels):
        found |= {'film': images(rows, len(levels)), 'film_levels': np.array(levels)}
    return {
        'title': 'Report of <run> & co', 'date': '2000-01-01 00:00 UTC', 'positions': 16,
        'origin': {'name': 'step 12 of run', 'step': 12}, 'noise_std': noise_std,
        'lowest_noise_std': noise_std,
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


METRICS = [
    {'step': s, 'loss': -0.1 * s, 'prior': 0.5, 'logdet': 0.1 * s, 'skipped': 2.0,
     'mean_square/block_0': 1.0, 'mean_square/block_1': 0.9} for s in (1, 2, 3)
]


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
