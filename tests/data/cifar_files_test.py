"""CIFAR in all archives of its site is the same set, and what is wrong with one is said."""

import gzip
import io
import os
import pickle
import struct
import tarfile
import tracemalloc

import numpy as np
import pytest
import scipy.io
from prepared_pictures import elements, last_error, manifest, run

from tarflow_jax.data import cifar_files

pytestmark = pytest.mark.usefixtures('in_threads')

COUNT = 3
NAMES = {
    10: ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck'],
    100: [f'thing_{k}' for k in range(100)],
}
KEYS = {10: 'labels', 100: 'fine_labels'}
ARCHIVES = {
    (10, 'python'): ('cifar-10-batches-py', '', 'batches.meta'),
    (10, 'binary'): ('cifar-10-batches-bin', '.bin', 'batches.meta.txt'),
    (10, 'matlab'): ('cifar-10-batches-mat', '.mat', 'batches.meta.mat'),
    (100, 'python'): ('cifar-100-python', '', 'meta'),
    (100, 'binary'): ('cifar-100-binary', '.bin', 'fine_label_names.txt'),
    (100, 'matlab'): ('cifar-100-matlab', '.mat', 'meta.mat'),
}


class OfPython2(pickle._Pickler):
    """Writes text and bytes alike as Python 2's str, as the site's files have them."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        data = value.encode('latin1') if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack('<i', len(data)) + data)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text


def pickled(value):
    data = io.BytesIO()
    OfPython2(data, protocol=2).dump(value)
    return data.getvalue().replace(b'numpy._core', b'numpy.core')


def rows(seed, classes):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (COUNT, 3072), np.uint8), rng.integers(0, classes, COUNT).tolist()


def file_of(kind, classes, seed):
    data, labels = rows(seed, classes)
    coarse = [label // 5 for label in labels]
    if kind == 'binary':
        heads = [labels] if classes == 10 else [coarse, labels]
        return np.concatenate([np.array(heads, np.uint8).T, data], 1).tobytes()
    found = {'data': data, KEYS[classes]: labels, 'batch_label': 'batch 1 of 5'}
    if classes == 100:
        found['coarse_labels'] = coarse
    if kind == 'python':
        return pickled(found)
    saved = io.BytesIO()
    arrays = {key: np.array(value, np.uint8)[:, None] for key, value in found.items() if 'labels' in key}
    scipy.io.savemat(saved, {'data': data, **arrays, 'batch_label': 'batch'}, do_compression=seed % 2 == 0)
    return saved.getvalue()


def names_of(kind, classes):
    key = 'label_names' if classes == 10 else 'fine_label_names'
    if kind == 'binary':
        return ('\n'.join(NAMES[classes]) + '\n\n').encode()
    if kind == 'python':
        return pickled({key: NAMES[classes], 'num_vis': 3072})
    saved = io.BytesIO()
    scipy.io.savemat(saved, {key: np.array(NAMES[classes], object)[:, None]})
    return saved.getvalue()


def write_folder(parent, classes, kind):
    name, suffix, meta = ARCHIVES[classes, kind]
    (parent / name).mkdir(parents=True)
    train = [f'data_batch_{k}' for k in range(1, 6)] if classes == 10 else ['train']
    for k, file in enumerate([*train, 'test_batch' if classes == 10 else 'test']):
        (parent / name / f'{file}{suffix}').write_bytes(file_of(kind, classes, k))
    (parent / name / meta).write_bytes(names_of(kind, classes))
    return parent / name


def write_archive(parent, classes, kind):
    folder = write_folder(parent, classes, kind)
    path = parent / f'cifar-{classes}-{kind}.tar.gz'
    with tarfile.open(path, 'w:gz') as tar:
        tar.add(folder, folder.name)
    return path


def check(out, classes):
    # As torchvision's reader takes them apart: rows are channels, then rows of the image.
    batches = 5 if classes == 10 else 1
    for split, seeds in (('train', range(batches)), ('test', [batches])):
        images, labels = elements(out, split)
        parts = [rows(seed, classes) for seed in seeds]
        pixels = np.concatenate([data for data, _ in parts]).reshape(-1, 3, 32, 32)
        np.testing.assert_array_equal(images, pixels.transpose(0, 2, 3, 1))
        assert labels == [label for _, labels in parts for label in labels]
    made = manifest(out)
    assert made['classes'] == NAMES[classes] and made['dataset'] == f'cifar{classes}'
    assert made['preprocessing'] == 'none' and 'crop' not in made['image']


@pytest.mark.parametrize('classes, kind', ARCHIVES)
def test_archives_and_folders(tmp_path, classes, kind):
    path = write_archive(tmp_path / 'cifar', classes, kind)
    run(path, tmp_path / 'a')
    check(tmp_path / 'a', classes)
    run(path.parent, tmp_path / 'b')  # the folder around the folder
    check(tmp_path / 'b', classes)


def test_resized(tmp_path):
    run(write_folder(tmp_path, 10, 'binary'), tmp_path / 'out', '--size=16', '--crop=adm', '--split=test')
    assert elements(tmp_path / 'out', 'test')[0].shape == (COUNT, 16, 16, 3)
    assert manifest(tmp_path / 'out')['image']['crop'] == 'adm'


class Runs:
    def __reduce__(self):
        return os.system, ('touch hacked',)


def deep_key():
    # A dict whose key is a tuple of a tuple of a tuple, whose hash would exhaust the stack.
    return b'\x80\x02}' + b')' + b'\x85' * 10**5 + b'K\x01s.'


@pytest.mark.parametrize('kind, name, data, says', [
    ('python', 'data_batch_2', lambda: pickle.dumps(Runs()), 'it asks for posix.system'),
    ('python', 'data_batch_2', deep_key, 'keys other than strings'),
    ('python', 'data_batch_2', lambda: file_of('python', 10, 0)[:-500], 'is damaged or not a'),
    ('python', 'data_batch_2', lambda: pickled({'data': [1]}), 'is damaged or not a C'),
    ('python', 'batches.meta', lambda: pickled({'label_names': ['a', 'b']}), 'the names of 10 classes'),
    ('binary', 'data_batch_2.bin', lambda: bytes(3000), 'has 3000 bytes, not a multiple of 3073'),
    ('binary', 'data_batch_2.bin', lambda: b'\x0a' + bytes(3072), 'a label outside 0 to 9'),
    ('matlab', 'data_batch_2.mat', lambda: file_of('matlab', 10, 1)[:-99], 'it is truncated'),
    ('matlab', 'data_batch_2.mat', lambda: b'hello', 'it is not a .mat file of version 5'),
])
def test_damaged_files_are_named(tmp_path, monkeypatch, kind, name, data, says, capfd):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path, 10, kind)
    (folder / name).write_bytes(data())
    run(folder, tmp_path / 'out', code=2)
    said = last_error(capfd)
    assert f'{folder / name} is damaged' in said and says in said
    assert not (tmp_path / 'hacked').exists()


def test_incomplete_folders_and_archives(tmp_path, capfd):
    folder = write_folder(tmp_path, 10, 'binary')
    (folder / 'data_batch_4.bin').unlink()
    run(folder, tmp_path / 'out', code=2)
    assert 'lacks data_batch_4.bin' in last_error(capfd)
    path = write_archive(tmp_path / 'other', 10, 'binary')
    os.truncate(path, path.stat().st_size // 2)
    run(path, tmp_path / 'out', code=2)
    assert 'cifar-10-binary.tar.gz is truncated or damaged' in last_error(capfd)


def test_bombs(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cifar_files, '_MAX_BYTES', 2**22)
    member = tarfile.TarInfo('cifar-10-batches-bin/zeros')
    member.size = 2**26
    with gzip.open(tmp_path / 'bomb.tar.gz', 'wb') as file:
        file.write(member.tobuf())
        for _ in range(64):
            file.write(bytes(2**20))
    tracemalloc.start()
    run(tmp_path / 'bomb.tar.gz', tmp_path / 'out', code=2)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert 'is truncated or damaged' in last_error(capfd)
