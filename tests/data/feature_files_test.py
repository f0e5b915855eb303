"""Features: each image gets its own, whatever else happens, and what is wrong with a file is said."""

import csv
import json
import pickle
import shutil

import numpy as np
import pytest
from prepared_pictures import content, elements, last_error, manifest, picture, run, save

from tarflow_jax.data import pipeline, shards, sources
from tarflow_jax.data.idx import write_idx

pytestmark = pytest.mark.usefixtures('in_threads')

COLUMNS = ['age', 'weight']


def vector(k):
    return [k + 0.5, -(3.0**k) / 7]


def write_csv(path, rows, columns=COLUMNS):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows([['image', *columns], *rows])
    return path


def rows(classes):
    """A row for each image of the set, in another order than theirs."""
    paths = sorted(classes.rglob('*.png'), key=lambda path: path.name, reverse=True)
    return [[str(path.relative_to(classes)), *vector(int(path.stem))] for path in paths]


def features(out, split):
    source = sources.load('prepared', split, path=str(out))
    return np.stack([source[i]['features'] for i in range(len(source))])


def vectors(*numbers):
    return np.array([vector(k) for k in numbers], np.float32)


def test_csv(classes, tmp_path):
    out = tmp_path / 'out'
    run(classes, out, '--size=8', f'--features={write_csv(tmp_path / "f.csv", rows(classes))}')
    images, labels = elements(out, 'train')  # which reads the features with TFDS, too
    np.testing.assert_array_equal(images, [picture(k) for k in range(6)])
    assert labels == [0, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(features(out, 'train'), vectors(*range(6)))
    np.testing.assert_array_equal(features(out, 'validation'), vectors(6, 7, 8))
    assert manifest(out)['features'] == COLUMNS
    made = json.loads((out / 'features.json').read_text())['featuresDict']['features']
    assert list(made) == ['features', 'image', 'label']
    source = sources.load('prepared', 'train', path=str(out))
    assert source.about['features'] == COLUMNS
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[3]['features'], vectors(3)[0])
    batches = pipeline.eval_batches(source, batch_size=6)
    np.testing.assert_array_equal(next(batches)['features'], vectors(*range(6)))
    batches.close()


def test_images_without_classes_and_one_split(tmp_path):
    for k in range(3):
        save(tmp_path / 'train' / f'{k}.png', picture(k))
    path = write_csv(tmp_path / 'f.csv', [[f'{k}.png', *vector(k)] for k in (2, 0, 1)])
    path.write_text('\ufeff' + path.read_text() + '\n')  # as spreadsheets write it
    run(tmp_path / 'train', tmp_path / 'out', '--size=8', f'--features={path}')
    elements(tmp_path / 'out', 'train')
    np.testing.assert_array_equal(features(tmp_path / 'out', 'train'), vectors(0, 1, 2))


def test_without_features_nothing_changes(classes, tmp_path):
    path = write_csv(tmp_path / 'f.csv', rows(classes))
    run(classes, tmp_path / 'with', '--size=8', f'--features={path}')
    run(classes, tmp_path / 'without', '--size=8')
    made = manifest(tmp_path / 'without')
    assert 'features' not in made
    source = sources.load('prepared', 'train', path=str(tmp_path / 'without'))
    assert 'features' not in source.about and source[0].keys() == {'image', 'label'}
    for split in ('train', 'validation'):
        for a, b in zip(elements(tmp_path / 'with', split), elements(tmp_path / 'without', split)):
            np.testing.assert_array_equal(a, b)


def test_a_skipped_image_takes_its_features_along(classes, tmp_path):
    (classes / 'train' / 'cat' / '1.png').write_text('hello')
    path = write_csv(tmp_path / 'f.csv', rows(classes))
    run(classes, tmp_path / 'out', '--size=8', f'--features={path}')
    images, _ = elements(tmp_path / 'out', 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in (0, 2, 3, 4, 5)])
    np.testing.assert_array_equal(features(tmp_path / 'out', 'train'), vectors(0, 2, 3, 4, 5))


def test_interrupted_and_damaged_sets_come_out_the_same(
    classes, tmp_path, small_shards, monkeypatch, capfd
):
    path = write_csv(tmp_path / 'f.csv', rows(classes))
    options = ['--size=8x4', f'--features={path}']
    run(classes, tmp_path / 'whole', *options)
    out, left, write_shard = tmp_path / 'out', [2], shards._write_shard

    def interrupted(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write_shard(*args)

    monkeypatch.setattr(shards, '_write_shard', interrupted)
    run(classes, out, *options, code=130)
    monkeypatch.setattr(shards, '_write_shard', write_shard)
    other = write_csv(tmp_path / 'g.csv', [[name, a, b + 1] for name, a, b in rows(classes)])
    run(classes, out, '--size=8x4', f'--features={other}', code=2)
    assert 'unfinished preparation with other images or options' in last_error(capfd)
    run(classes, out, *options)
    assert 'shards, which are finished' in capfd.readouterr().err
    assert content(out) == content(tmp_path / 'whole')
    next(out.glob('pets-train.array_record-00001-of-*')).unlink()
    run(classes, out, *options)
    assert content(out) == content(tmp_path / 'whole')
    run(classes, out, '--size=8x4', f'--features={other}', code=2)
    assert "already has the split 'train' with other images or" in last_error(capfd)


def test_rows_of_no_image_are_counted(classes, tmp_path, capfd):
    path = write_csv(tmp_path / 'f.csv', rows(classes))
    run(classes, tmp_path / 'out', '--size=8', f'--features={path}', '--split=validation')
    said = capfd.readouterr().err
    assert f"{path}: ignored 6 rows that belong to no image of the dataset, such as 'train/dog/5.png'" in said
    np.testing.assert_array_equal(features(tmp_path / 'out', 'validation'), vectors(6, 7, 8))


def test_other_columns_in_another_split(classes, tmp_path, capfd):
    def prepared(split, columns, code=0):
        made = [[name.partition('/')[2], *([1.5] * len(columns))] for name, *_ in rows(classes)]
        path = write_csv(tmp_path / 'f.csv', made, columns)
        more = [f'--features={path}'] if columns else []
        run(classes / split, tmp_path / 'out', '--size=8', *more, code=code)

    prepared('train', ['a', 'b'])
    for columns, says in (
        (['a', 'b', 'c'], 'was prepared with 2 features (a, b), but this command has 3 features (a, b,'),
        (['a', 'c'], 'but this command has 2 features (a, c); pass the same columns as --features'),
        ([], 'was prepared with 2 features (a, b), but this command has no features; pass'),
    ):
        prepared('val', columns, code=2)
        assert says in last_error(capfd)
    prepared('val', ['a', 'b'])
    assert list(manifest(tmp_path / 'out')['splits']) == ['train', 'validation']


@pytest.mark.parametrize('change, says', [
    (lambda text: text.replace('train/cat/2.png', 'train/cat/20.png'),
     "has no row for 'train/cat/2.png' (1 of 6 images of the split train have none); add"),
    (lambda text: text.replace('2.5', 'old'), "line 8: could not convert string to float: 'old'"),
    (lambda text: text.replace('2.5', ''), "line 8: could not convert string to float: ''; write"),
    (lambda text: text.replace('2.5', 'nan'),
     "has nan as the feature 'age' of the image 'train/cat/2.png', which is not a finite float32"),
    (lambda text: text.replace('2.5', '1e39'), "has inf as the feature 'age' of the image"),
    (lambda text: text.replace('2.5', '2.5,1'), 'line 8: 3 numbers, but the header names 2'),
    (lambda text: text.replace('2.5,', ''), 'line 8: 1 numbers, but the header names 2'),
    (lambda text: text + text.splitlines()[3], 'appears twice; write a header'),
    (lambda text: 'image\n', 'line 1: its header names no feature after the first column'),
    (lambda text: '', 'its header names no feature'),
    (lambda text: 'image,age\n', "has no row for 'train/cat/0.png' (6 of 6 images"),
    (lambda text: text.replace('2.5', '\udcff'), "codec can't decode byte 0xff"),
])
def test_refused_csv(classes, tmp_path, change, says, capfd):
    path = write_csv(tmp_path / 'f.csv', rows(classes))
    path.write_text(change(path.read_text()), errors='surrogateescape')
    run(classes, tmp_path / 'out', '--size=8', f'--features={path}', code=2)
    said = last_error(capfd)
    assert says in said and str(path) in said
    assert not (tmp_path / 'out').exists()


def write_digits(folder, count=5):
    folder.mkdir()
    for split, seed in (('train', 0), ('t10k', 1)):
        write_idx(folder / f'{split}-images-idx3-ubyte', picture(seed, (count, 6, 4)))
        write_idx(folder / f'{split}-labels-idx1-ubyte', np.arange(count, dtype=np.uint8))


@pytest.mark.parametrize('dtype', [np.float32, np.float64, np.int16])
def test_npy(tmp_path, dtype, small_shards, monkeypatch):
    monkeypatch.setattr('tarflow_jax.data.splits.SHARD_PIXEL_BYTES', 2 * 6 * 4)
    monkeypatch.setattr('tarflow_jax.data.splits.IMAGES_PER_TASK', 1)
    write_digits(tmp_path / 'digits')
    made = {}
    for split in ('train', 'test'):
        made[split] = np.random.default_rng(len(split)).normal(0, 99, (5, 3)).astype(dtype)
        np.save(tmp_path / 'f.npy', made[split])
        run(tmp_path / 'digits', tmp_path / 'out', f'--split={split}',
            f'--features={tmp_path / "f.npy"}')
    assert manifest(tmp_path / 'out')['features'] == ['0', '1', '2']
    assert len(manifest(tmp_path / 'out')['splits']['test']['shards']) == 3
    for split, seed in (('train', 0), ('test', 1)):
        images, _ = elements(tmp_path / 'out', split)
        np.testing.assert_array_equal(images[..., 0], picture(seed, (5, 6, 4)))
        np.testing.assert_array_equal(
            features(tmp_path / 'out', split), made[split].astype(np.float32)
        )


@pytest.mark.parametrize('made, says', [
    (np.ones((4, 3)), 'has the shape [4, 3], but the split train has 5 images; write one row for each'),
    (np.ones(5), 'has the shape [5], but'),
    (np.ones((5, 0)), 'has the shape [5, 0], but'),
    (np.ones((5, 1), complex), 'is not an array of numbers; write float32 [5, F]'),
    (np.full((5, 1), None), 'is not a .npy file'),
    (np.full((5, 2), [0, -np.inf]), "has -inf as the feature '1' of the image 0, which is no"),
    (np.full((5, 1), 1e39), "has 1e+39 as the feature '0' of the image 0, which is not a finite"),
])
def test_refused_npy(tmp_path, made, says, capfd):
    write_digits(tmp_path / 'digits')
    np.save(tmp_path / 'f.npy', made)
    run(tmp_path / 'digits', tmp_path / 'out', '--split=train',
        f'--features={tmp_path / "f.npy"}', code=2)
    assert f'{tmp_path / "f.npy"} {says}' in last_error(capfd)


def test_refused_files(classes, tmp_path, capfd):
    write_digits(tmp_path / 'digits')
    np.save(tmp_path / 'f.npy', np.ones((5, 3)))
    (tmp_path / 'words.npy').write_text('hello')
    for source, name, says in (
        ('digits', 'f.npy', 'has the features of one split, but this source has train and test;'),
        ('digits', 'f.csv', 'parquet, CIFAR, batch or IDX files need a .npy file; give one'),
        ('pets', 'f.npy', 'image files need a .csv file; give one'),
        ('pets', 'f.csv', 'f.csv does not exist; correct --features'),
    ):
        run(tmp_path / source, tmp_path / 'out', f'--features={tmp_path / name}', code=2)
        assert says in last_error(capfd)
    run(tmp_path / 'digits', tmp_path / 'out', '--split=test',
        f'--features={tmp_path / "words.npy"}', code=2)
    assert 'words.npy is not a .npy file' in last_error(capfd)


def test_tfds_passes_features_on(classes, tmp_path):
    out = tmp_path / 'out'
    run(classes, out, '--size=8', f'--features={write_csv(tmp_path / "f.csv", rows(classes))}')
    shutil.copytree(out, tmp_path / 'tfds' / 'pets' / '1.0.0')
    source = sources.load('tfds', 'train', path=str(tmp_path / 'tfds'), name='pets')
    assert source.about['features'] == ['0', '1']
    for k in (0, 5):
        np.testing.assert_array_equal(source[k]['image'], picture(k))
        np.testing.assert_array_equal(source[k]['features'], vectors(k)[0])
        assert source[k]['features'].dtype == np.float32
