"""The ImageNet site's batch files: read right, and harmless if they are not what they should be."""

import os
import pickle

import numpy as np
import pytest

from tarflow_jax.data import batch_files

COUNT, SIZE = 5, 8


def content(**changed):
    rng = np.random.default_rng(0)
    return {
        'data': rng.integers(0, 256, (COUNT, 3 * SIZE * SIZE), np.uint8),
        'labels': [1, 1000, 2, 7, 7],
        'mean': np.zeros(3 * SIZE * SIZE),
        **changed,
    }


def write(path, what, protocol=4):
    path.write_bytes(pickle.dumps(what, protocol=protocol))
    return path


@pytest.mark.parametrize('protocol', [0, 2, 3, 4, 5])
def test_reads_every_protocol(tmp_path, protocol):
    made = content()
    batch = batch_files.read_batch(write(tmp_path / 'val_data', made, protocol))
    assert batch.label_N.tolist() == [0, 999, 1, 6, 6] and batch.label_N.dtype == np.int32
    images = batch.images(1, 4)
    assert images.shape == (3, SIZE, SIZE, 3) and images.dtype == np.uint8
    for row, image in zip(made['data'][1:4], images):
        assert image[2, 3].tolist() == [row[c * SIZE * SIZE + 2 * SIZE + 3] for c in range(3)]


def test_reads_the_names_of_older_numpy(tmp_path):
    path = tmp_path / 'val_data'
    data = pickle.dumps(content(), protocol=3)
    path.write_bytes(data.replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    assert batch_files.read_batch(path).images(0, 5).shape == (5, SIZE, SIZE, 3)


def test_large_pixels_are_not_read_into_memory(tmp_path):
    rows = np.arange(400, dtype=np.uint8)[:, None] * np.ones((1, 12288), np.uint8)
    path = write(tmp_path / 'val_data', {'data': rows, 'labels': [1] * 400})
    batch = batch_files.read_batch(path)
    assert not batch.pixel_Nx3xSxS.flags.owndata
    assert (batch.images(300, 301) == 300 % 256).all()


@pytest.mark.parametrize('changed, says', [
    ({'labels': [1, 2, 3]}, 'has 5 images but 3 labels'),
    ({'labels': [0, 1, 2, 3, 4]}, 'has the label 0, outside 1 to 1000'),
    ({'labels': [1, 1001, 2, 3, 4]}, 'has the label 1001'),
    ({'labels': ['1', 2, 3, 4, 5]}, 'labels that are not whole numbers'),
    ({'labels': np.ones(5)}, 'labels that are not whole numbers'),
    ({'data': np.zeros((5, 190), np.uint8)}, 'rows of 190 numbers, which is not a square'),
    ({'data': np.zeros((5, 192), np.int64)}, 'data other than uint8'),
    ({'data': np.zeros(960, np.uint8)}, 'data other than uint8'),
    ({'data': [1, 2]}, 'data other than uint8'),
    ({'data': np.array([None] * 5)}, "it contains an array of 'O8'"),
])
def test_wrong_contents(tmp_path, changed, says):
    path = write(tmp_path / 'train_data_batch_3', content(**changed))
    with pytest.raises(ValueError, match='train_data_batch_3 .*' + says) as error:
        batch_files.read_batch(path)
    assert '\n' not in str(error.value)


class Runs:
    def __init__(self, *call):
        self._call = call

    def __reduce__(self):
        return self._call


@pytest.mark.parametrize('hostile, says', [
    (Runs(os.system, ('touch hacked',)), 'it asks for posix.system'),
    (Runs(eval, ('1',)), 'it asks for .*eval'),
    (Runs(np.load, ('x.npy',)), 'it asks for numpy.load'),
    (Runs(np.frombuffer, (b'12', 'O')), 'it asks for numpy'),
    ([Runs(np.dtype, ('O',))], "it contains an array of 'O'"),
    ([Runs(np.dtype, ([('a', 'O')],))], 'it contains an array of'),
])
@pytest.mark.parametrize('protocol', [0, 2, 4])
def test_hostile_pickles_run_nothing(tmp_path, monkeypatch, hostile, says, protocol):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(content(data=hostile), protocol=protocol)
    path = tmp_path / 'val_data'
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f'val_data is damaged or not a file .*{says}'):
        batch_files.read_batch(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ['val_data']


@pytest.mark.parametrize('data', [
    b'', b'\x80', b'hello', b'\x80\x04N.', b'\x80\x04]\x94.', b'(' * 5000 + b'.',
    # 2**40 bytes promised; a memo of 2**31 entries; a change of what may be called.
    b'\x80\x04\x8e' + (2**40).to_bytes(8, 'little') + b'x.',
    b'\x80\x04Nr\xff\xff\xff\x7f.',
    b'\x80\x02c_codecs\nencode\nN}X\x05\x00\x00\x00_callNs\x86b.',
])
def test_junk_is_one_sentence(tmp_path, data):
    path = tmp_path / 'val_data'
    path.write_bytes(data)
    with pytest.raises(ValueError, match='download it again') as error:
        batch_files.read_batch(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('keep', [0.1, 0.5, 0.999])
def test_truncated(tmp_path, keep):
    path = write(tmp_path / 'val_data', content())
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ValueError, match='val_data is damaged'):
        batch_files.read_batch(path)


def test_finds_all_or_names_the_missing(tmp_path):
    assert batch_files.find(tmp_path) == {}
    for name in (*batch_files.TRAIN_NAMES, 'val_data'):
        (tmp_path / name).touch()
    assert [len(paths) for paths in batch_files.find(tmp_path).values()] == [10, 1]
    (tmp_path / 'train_data_batch_3').unlink()
    (tmp_path / 'train_data_batch_10').unlink()
    with pytest.raises(FileNotFoundError, match='lacks train_data_batch_3, train_data_batch_10 of'):
        batch_files.find(tmp_path)


def test_class_names(tmp_path):
    assert batch_files.class_names(tmp_path) == [str(k) for k in range(1, 1001)]
    rows = [f'n{9000 - k:08d} {k} thing_{k}' for k in range(1, 1001)]
    path = tmp_path / 'map_clsloc.txt'
    path.write_text('\n'.join(reversed(rows)))
    assert batch_files.class_names(tmp_path)[:2] == ['n00008999', 'n00008998']
    path.write_text('\n'.join(rows[:-1]))
    with pytest.raises(ValueError, match='does not name each of the classes 1 to 1000'):
        batch_files.class_names(tmp_path)
