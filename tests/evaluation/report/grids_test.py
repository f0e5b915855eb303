"""The image grids of training, cut into the pictures they were made of."""

import numpy as np
import pytest
from PIL import Image

from tarflow_jax.evaluation.report import grids, markup
from tarflow_jax.training import pictures


def pixels(count=100, size=8, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, channels), np.uint8)


@pytest.mark.parametrize('captions', [
    None, [f'class {i % 10}' for i in range(100)], [f'class {i}' for i in range(100)],
])
@pytest.mark.parametrize('size, channels', [(8, 3), (20, 1), (130, 1)])
def test_cut_as_they_were_put_together(captions, size, channels):
    given = pixels(30, size, channels)
    sheet = pictures.sheet(given, grids.COLUMNS, captions and captions[:30])
    np.testing.assert_array_equal(grids.tiles(sheet, given.shape[1:]), given)


def test_the_grids_of_a_run_evenly_spaced(tmp_path):
    # 40 steps, of which the first have no guided grid.
    (tmp_path / 'samples').mkdir()
    for step in range(1, 41):
        for kind in ('noise', 'guided' if step > 5 else 'raw'):
            sheet = pictures.sheet(pixels(10, seed=step), 10, None)
            Image.fromarray(sheet).save(tmp_path / 'samples' / f'step_{step:07d}_{kind}.png')
    (tmp_path / 'samples' / 'step_0000040').mkdir()  # a set of samples
    (tmp_path / 'samples' / 'step_0000006_guided.png').write_bytes(b'damaged')
    found = grids.read(tmp_path, (8, 8, 3), ['a'] * 10)
    assert found['kind'] == 'guided' and found['names'] == ['a'] * 10
    assert len(found['steps']) == len(found['frames']) == grids.MOST_STEPS - 1
    assert found['steps'][0] == 8 and found['steps'][-1] == 40
    assert set(np.diff(found['steps'])) <= {2, 3}
    np.testing.assert_array_equal(found['frames'][-1], pixels(10, seed=40))


def test_no_grids_and_grids_of_other_images(tmp_path):
    assert grids.read(tmp_path, (8, 8, 3))['steps'] == []
    sheet = pictures.sheet(pixels(size=16), 10, None)
    pictures.save_png(tmp_path / 'samples' / 'step_0000001_raw.png', sheet)
    assert grids.read(tmp_path, (8, 8, 3))['steps'] == []
    assert grids.read(tmp_path, (16, 16, 3))['steps'] == [1]


def test_large_pictures_are_shrunk(tmp_path):
    sheet = pictures.sheet(pixels(size=128, count=10), 10, None)
    pictures.save_png(tmp_path / 'samples' / 'step_0000001_raw.png', sheet)
    [frame] = grids.read(tmp_path, (128, 128, 3))['frames']
    assert frame.shape == (10, markup.LARGEST_SIDE, markup.LARGEST_SIDE, 3)
