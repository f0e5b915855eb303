"""Sets of samples as files: the layout that others read, and what is refused."""

import io
import zipfile

import numpy as np
import pytest
from prepared_pictures import elements

from tarflow_jax.evaluation import sample_files

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 4, 5, 3), np.uint8)
LABELS = np.arange(7, dtype=np.int32) % 3


def write(path, labels=LABELS, cuts=(3, 4)):
    sample_files.write_npz(path, np.split(IMAGES, cuts), IMAGES.shape, labels)
    return path


def test_npz_is_what_numpy_writes(tmp_path):
    path = write(tmp_path / 'samples.npz')
    arrays = np.load(path)
    assert arrays.files == ['arr_0', 'arr_1'] and arrays['arr_1'].dtype == np.int64
    np.testing.assert_array_equal(arrays['arr_0'], IMAGES)
    np.testing.assert_array_equal(arrays['arr_1'], LABELS)
    wanted = io.BytesIO()
    np.savez(wanted, IMAGES, LABELS.astype(np.int64))
    with zipfile.ZipFile(path) as found, zipfile.ZipFile(wanted) as by_numpy:
        assert found.testzip() is None
        for name in ('arr_0.npy', 'arr_1.npy'):
            assert found.read(name) == by_numpy.read(name)
    # Neither the clock nor the pieces can be seen in it.
    assert write(tmp_path / 'again.npz', cuts=(1, 2, 6)).read_bytes() == path.read_bytes()
    assert np.load(write(tmp_path / 'without.npz', labels=None)).files == ['arr_0']


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
@pytest.mark.parametrize('dtype', [np.int64, np.uint8])
def test_open_anyones_npz(tmp_path, save, dtype):
    path = tmp_path / 'theirs.npz'
    save(path, IMAGES, LABELS.astype(dtype))
    source = sample_files.open_samples(path)
    assert len(source) == 7 and source.label_N.dtype == np.int32
    for i in (0, 6):
        np.testing.assert_array_equal(source[i]['image'], IMAGES[i])
        assert source[i]['label'] == LABELS[i]
    first = sample_files.open_samples(path, 2)
    assert len(first) == 2 and first.about['images'] == 2
    np.testing.assert_array_equal(first[1]['image'], IMAGES[1])
    with pytest.raises(IndexError):
        first[2]
    save(path, arr_0=IMAGES[..., :1], mu=np.zeros(3))
    source = sample_files.open_samples(path)
    assert source[6]['image'].shape == (4, 5, 1) and (source.label_N == -1).all()


def test_images_stay_on_disk(tmp_path):
    source = sample_files.open_samples(write(tmp_path / 'samples.npz'))
    assert isinstance(source.image_NxHxWxC, np.memmap)
    np.testing.assert_array_equal(source.image_NxHxWxC, IMAGES)


def test_open_fortran_order(tmp_path):
    np.savez(tmp_path / 'theirs.npz', np.asfortranarray(IMAGES))
    source = sample_files.open_samples(tmp_path / 'theirs.npz')
    np.testing.assert_array_equal(source.image_NxHxWxC, IMAGES)


@pytest.mark.parametrize('arrays, words', [
    (dict(images=IMAGES), 'it has images'),
    (dict(), 'it has nothing'),
    (dict(arr_0=IMAGES / 255.0), 'arr_0 is float64'),
    (dict(arr_0=IMAGES.transpose(0, 3, 1, 2)), r'arr_0 is uint8 \[7, 3, 4, 5\]'),
    (dict(arr_0=IMAGES[..., 0]), r'arr_0 is uint8 \[7, 4, 5\]'),
    (dict(arr_0=IMAGES[:0]), r'arr_0 is uint8 \[0, 4, 5, 3\]'),
    (dict(arr_0=np.array([None])), 'arr_0.npy: it contains Python objects'),
    (dict(arr_0=IMAGES, arr_1=LABELS[:6]), r'arr_1 is int32 \[6\] for 7 images'),
    (dict(arr_0=IMAGES, arr_1=np.eye(7)), r'arr_1 is float64 \[7, 7\]'),
], ids=lambda x: x if isinstance(x, str) else '')
def test_other_layouts_are_refused(tmp_path, arrays, words):
    path = tmp_path / 'theirs.npz'
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match=words) as refused:
        sample_files.open_samples(path)
    sentence = str(refused.value)
    assert str(path) in sentence and 'samples need arr_0, uint8 [N, H, W, 1 or 3]' in sentence


def test_what_cannot_be_opened(tmp_path):
    path = write(tmp_path / 'samples.npz')
    with pytest.raises(ValueError, match='has 7 images, but 8 are needed; sample more'):
        sample_files.open_samples(path, 8)
    with pytest.raises(FileNotFoundError, match='nosuch.npz does not exist; run --mode=sample'):
        sample_files.open_samples(tmp_path / 'nosuch.npz')
    with pytest.raises(FileNotFoundError, match='no finished set of samples: samples.json'):
        sample_files.open_samples(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:-30], whole[30:], b'', b'PK'):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match='samples.npz is not a .npz of samples'):
            sample_files.open_samples(path)


@pytest.mark.parametrize('labels', [None, LABELS])
def test_rectangular_array_record(tmp_path, labels):
    path = tmp_path / 'samples'
    sample_files.write_array_record(path, np.split(IMAGES, (3, 4)), IMAGES.shape, labels, ['a', 'b', 'c'])
    source = sample_files.open_samples(path)
    np.testing.assert_array_equal(np.stack([source[i]['image'] for i in range(7)]), IMAGES)
    wanted = [-1] * 7 if labels is None else LABELS.tolist()
    assert [int(source[i]['label']) for i in range(7)] == wanted
    assert source.about['image'] == {'size': [4, 5], 'channels': 3, 'encoding': 'png'}
    images, _ = elements(path, sample_files.SPLIT)  # TFDS reads the same
    np.testing.assert_array_equal(images, IMAGES)


@pytest.mark.parametrize('save', [write, lambda path: np.savez_compressed(path, IMAGES, LABELS)])
def test_flipped_bytes_are_noticed(tmp_path, save):
    path = tmp_path / 'samples.npz'
    save(path)
    whole, rng, noticed = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            source = sample_files.open_samples(path)
        except ValueError:
            noticed += 1
            continue
        np.testing.assert_array_equal(source.image_NxHxWxC, IMAGES)
        np.testing.assert_array_equal(source.label_N, LABELS)
    assert noticed > 50  # the rest are dates and the like


def test_a_header_that_claims_too_much(tmp_path):
    path = tmp_path / 'samples.npz'
    for save, wrong in ((np.savez, 'has another size than'), (np.savez_compressed, 'has another size than')):
        claims = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            claims, {'descr': '|u1', 'fortran_order': False, 'shape': (10**6, 64, 64, 3)}
        )
        with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED if save is not np.savez else 0) as file:
            file.writestr('arr_0.npy', claims.getvalue() + bytes(1000))
        with pytest.raises(ValueError, match=wrong):
            sample_files.open_samples(path)
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr('arr_0.npy', bytes(2**26 + 1))
    with pytest.raises(ValueError, match='is a decompression bomb'):
        sample_files.open_samples(path)


@pytest.mark.parametrize('text', [
    '', '{', '[' * 10**5, '{"count": 22}', '{"count": 1e400, "format": "npz"}', '[]', '\udcff',
    '{"count": %s, "format": "npz"}' % ('9' * 5000), None,
])
def test_damaged_samples_json_is_as_none(tmp_path, text, caplog):
    write(tmp_path / 'samples.npz')
    if text is None:
        (tmp_path / sample_files.ABOUT).mkdir()
    else:
        (tmp_path / sample_files.ABOUT).write_bytes(text.encode(errors='surrogateescape'))
    assert sample_files.read_about(tmp_path) is None
    assert caplog.messages[0].startswith(f'{tmp_path / sample_files.ABOUT} is damaged (')
    with pytest.raises(FileNotFoundError, match='no finished set of samples'):
        sample_files.open_samples(tmp_path)
