"""A folder of images as a source."""

import numpy as np
import pytest
from PIL import Image

from tarflow_jax.data.image_folder import ImageFolder


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / 'dress').mkdir()
    (tmp_path / '2').mkdir()
    pixels = rng.integers(0, 256, (8, 8), np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    Image.fromarray(pixels).save(tmp_path / '2' / 'b.png')
    colour = rng.integers(0, 256, (20, 16, 3), np.uint8)
    Image.fromarray(colour).save(tmp_path / 'dress' / 'c.png')
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n')
    return tmp_path, pixels


def test_images_labels_and_what_is_left_out(folder):
    path, pixels = folder
    source = ImageFolder(path, (8, 8, 1), ['coat', 'dress', 'bag'], 3)
    assert source.names == ['2/b.png', 'a.png', 'dress/c.png'] and len(source) == 3
    assert [int(source[i]['label']) for i in range(3)] == [2, -1, 1]
    np.testing.assert_array_equal(source[1]['image'], pixels[..., None])
    assert all(source[i]['image'].shape == (8, 8, 1) for i in range(3))
    assert {name for name, _ in source.problems} == {'notes.txt', 'broken.png'}
    assert all(reason.startswith('is ') for _, reason in source.problems)
    assert source.about['images'] == 3 and not source.notes
    # A flow without classes, in colour; all are enlarged, which is noted.
    source = ImageFolder(path, (24, 24, 3), None)
    assert [int(source[i]['label']) for i in range(3)] == [-1, -1, -1]
    assert source[2]['image'].shape == (24, 24, 3) and len(source.notes) == 3


def test_folders_that_do_not_fit(folder, tmp_path_factory):
    path, _ = folder
    with pytest.raises(ValueError, match='1 or 3 channels, and the flow has 2'):
        ImageFolder(path, (8, 8, 2), None)
    with pytest.raises(FileNotFoundError, match='does not exist'):
        ImageFolder(path / 'nowhere', (8, 8, 1), None)
    empty = tmp_path_factory.mktemp('empty')
    (empty / 'notes.txt').write_text('no image')
    with pytest.raises(ValueError, match='has no readable image: notes.txt is not an image'):
        ImageFolder(empty, (8, 8, 1), None)
