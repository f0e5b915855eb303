"""Parquet: what Hugging Face keeps comes out as it went in, and damage is one sentence."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepared_pictures import content, elements, encoded, last_error, manifest, picture, run

from tarflow_jax.data import parquet_files

pytestmark = pytest.mark.usefixtures('in_threads')

IMAGE = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
NAMES = ['cat', 'dog', 'fish']


def table(numbers, labels, names=NAMES, image='image', label='label'):
    rows = [{'bytes': encoded(picture(k)), 'path': f'{k}.png'} for k in numbers]
    features = {image: {'_type': 'Image'}, label: {'names': names, '_type': 'ClassLabel'}}
    made = pa.table({image: pa.array(rows, IMAGE), label: pa.array(labels, pa.int64())})
    return made.replace_schema_metadata(
        {b'huggingface': json.dumps({'info': {'features': features}})}
    )


@pytest.fixture
def hub(tmp_path):
    """A folder as the hub has it: three files for train, of row groups of 4, and two others."""
    folder = tmp_path / 'pets'
    (folder / 'data').mkdir(parents=True)
    for j in range(3):
        numbers = range(10 * j, 10 * j + 10)
        pq.write_table(
            table(numbers, [k % 3 for k in numbers]),
            folder / 'data' / f'train-{j:05d}-of-00003.parquet', row_group_size=4,
        )
    for name, k, labels in (('validation', 50, [2, 1, 0]), ('test', 60, [-1, -1, -1])):
        pq.write_table(table(range(k, k + 3), labels), folder / 'data' / f'{name}-00000-of-00001.parquet')
    (folder / 'README.md').write_text('hello')
    return folder


def test_a_folder_of_the_hub(hub, tmp_path, small_shards):
    out = tmp_path / 'out'
    run(hub, out)
    images, labels = elements(out, 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in range(30)])
    assert labels == [k % 3 for k in range(30)]
    assert elements(out, 'validation')[1] == [2, 1, 0]
    made = manifest(out)
    assert made['classes'] == NAMES and made['dataset'] == 'pets'
    assert made['image'] == {'size': 8, 'channels': 3, 'encoding': 'png'}
    assert list(made['splits']) == ['train', 'validation']
    (name, note), = made['splits']['train']['notes']['list']
    assert name == 'test' and note.startswith('has no labels, but the other splits have')
    run(hub, tmp_path / 'test', '--split=test')
    assert manifest(tmp_path / 'test')['classes'] is None
    assert elements(tmp_path / 'test', 'test')[1] == [-1] * 3
    run(hub, tmp_path / 'small', '--size=4', '--crop=edm', '--split=validation')
    assert manifest(tmp_path / 'small')['image']['crop'] == 'edm'


def nested(shape, kind):
    for _ in shape:
        kind = pa.list_(kind)
    return pa.array([picture(k, shape).tolist() for k in range(5)], kind)


@pytest.mark.parametrize('columns, shape, classes, labels', [
    ({'image': nested((6, 5), pa.int64()), 'label': list('babca')}, (6, 5), list('abc'), [1, 0, 1, 2, 0]),
    ({'img': nested((6, 5, 3), pa.uint8()), 'fine_label': [0, 2, 1, 0, 2]}, (6, 5, 3), list('012'), [0, 2, 1, 0, 2]),
    ({'image': [encoded(picture(k)) for k in range(5)]}, (8, 8, 3), None, [-1] * 5),
])
def test_other_columns(tmp_path, columns, shape, classes, labels):
    pq.write_table(pa.table(columns), tmp_path / 'digits.parquet')
    run(tmp_path / 'digits.parquet', tmp_path / 'out', '--split=train')
    images, got = elements(tmp_path / 'out', 'train')
    np.testing.assert_array_equal(images.reshape(5, *shape), [picture(k, shape) for k in range(5)])
    assert got == labels and manifest(tmp_path / 'out')['classes'] == classes
    assert manifest(tmp_path / 'out')['dataset'] == 'digits'


def test_images_that_are_none_are_named(tmp_path):
    rows = [picture(k, (6, 5)).tolist() for k in range(3)]
    rows += [[[1, 2], [3]], None, [[256] * 5] * 6, picture(4, (4, 5)).tolist()]
    pq.write_table(pa.table({'image': rows}), tmp_path / 'train.parquet')
    run(tmp_path / 'train.parquet', tmp_path / 'out')
    skipped = dict(manifest(tmp_path / 'out')['splits']['train']['skipped']['list'])
    none = 'is not an image of 1 channel(s) from 0 to 255'
    assert skipped == {
        **{f'train.parquet[{k}]': none for k in (3, 4, 5)}, 'train.parquet[6]': 'is 5x4, not 5x6',
    }


def test_a_second_split_keeps_the_numbers_of_the_classes(tmp_path, capfd):
    for name, labels in (('train', list('abc')), ('test', list('cb')), ('dev', list('xa'))):
        images = [encoded(picture(k)) for k in range(len(labels))]
        pq.write_table(pa.table({'image': images, 'label': labels}), tmp_path / f'{name}.parquet')
    run(tmp_path / 'train.parquet', tmp_path / 'out', '--name=letters')
    run(tmp_path / 'test.parquet', tmp_path / 'out', '--name=letters')
    assert elements(tmp_path / 'out', 'test')[1] == [2, 1]
    run(tmp_path / 'dev.parquet', tmp_path / 'out', '--name=letters', code=2)
    assert "has the class 'x', which is not among the 3 classes" in last_error(capfd)


def damage_page(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 8:len(data) // 4] = bytes(len(data) // 4 - len(data) // 8)
    path.write_bytes(data)


@pytest.mark.parametrize('damage, says', [
    (lambda path: os.truncate(path, path.stat().st_size // 2), 'is damaged or not a parquet'),
    (lambda path: path.write_bytes(b'PAR1hello'), 'is damaged or not a parquet file'),
    (lambda path: path.write_bytes(b''), 'is damaged or not a parquet file'),
    (damage_page, 'is damaged or not a parquet file'),
    (lambda path: path.unlink(), 'lacks train-00001-of-00003.parquet (1 of 3 files are missing)'),
    (lambda path: pq.write_table(pa.table({'picture': [b'x']}), path), 'none called image or img'),
    (lambda path: pq.write_table(pa.table({'image': ['a']}), path), 'neither bytes nor lists of whole'),
    (lambda path: pq.write_table(pa.table({'image': [[[0.5]]]}), path), 'neither bytes nor lists of'),
    (lambda path: pq.write_table(pa.table({'image': [b'x'], 'label': [0.5]}), path), 'prepare one dataset'),
    (lambda path: pq.write_table(table([0], [0]).set_column(1, 'label', [['cat']]), path), 'others with names'),
    (lambda path: pq.write_table(table([0], [3]), path), 'has the label 3, but its schema names 3'),
    (lambda path: pq.write_table(table([0], [-2]), path), 'has labels above a million'),
    (lambda path: pq.write_table(table([0], [-1]), path), 'has no label in row 0'),
    (lambda path: pq.write_table(table([0], [0], names=['a']), path), 'prepare one dataset'),
])
def test_refuses(hub, tmp_path, damage, says, capfd):
    damage(hub / 'data' / 'train-00001-of-00003.parquet')
    run(hub, tmp_path / 'out', code=2)
    assert says in last_error(capfd)


def test_rows_beside_image_files_are_no_set(classes, tmp_path):
    pq.write_table(pa.table({'age': [1]}), classes / 'train-metadata.parquet')
    run(classes, tmp_path / 'out', '--size=8')
    assert elements(tmp_path / 'out', 'train')[1] == [0, 0, 0, 0, 1, 1]


def test_names_without_a_split(hub, tmp_path, capfd):
    path = (hub / 'data' / 'test-00000-of-00001.parquet').rename(hub / 'data' / 'part.parquet')
    run(path, tmp_path / 'out', code=2)
    assert 'has no split, unlike train-00000-of-00001.parquet; name the' in last_error(capfd)
    run(hub, tmp_path / 'out', '--test_fraction=0.1', '--split=train', code=2)
    assert 'rename it, or prepare it alone' in last_error(capfd)
    path.unlink()
    run(hub, tmp_path / 'out', '--test_fraction=0.1', code=2)
    assert '--test_fraction is 0.1, but' in last_error(capfd)


def test_a_bomb_is_read_one_row_at_a_time(tmp_path, monkeypatch):
    # One image, as long as a task may be, in 500 rows of a dictionary; and rows promised that no
    # file of this size holds.
    monkeypatch.setattr(parquet_files, '_BYTES_AT_ONCE', 2**16)
    pq.write_table(pa.table({'image': [bytes(2**16)] * 500}), tmp_path / 'train.parquet', compression='zstd')
    part = parquet_files.open_part(tmp_path / 'train.parquet')
    assert [len(some) for some in parquet_files.images(part, 10, 14)] == [1] * 4
    pq.write_table(pa.table({'image': [b''] * (10**6 + 1)}), tmp_path / 'test.parquet')
    with pytest.raises(ValueError, match='it promises 1000001 rows'):
        parquet_files.open_part(tmp_path / 'test.parquet')
    monkeypatch.setattr(parquet_files, 'BOMB_BYTES', 2**20)
    table = pa.table({'image': [bytes(2**22)]})
    pq.write_table(table, tmp_path / 'val.parquet', compression='zstd', use_dictionary=False)
    with pytest.raises(ValueError, match='a decompression bomb: .* bytes unpack to 41943'):
        list(parquet_files.images(parquet_files.open_part(tmp_path / 'val.parquet'), 0, 1))
    zeros = pa.array([[[0] * 1000] * 1000] * 4, pa.list_(pa.list_(pa.uint8())))
    pq.write_table(pa.table({'image': zeros}), tmp_path / 'dev.parquet')
    monkeypatch.setattr(parquet_files, '_MAX_VALUES', 10**6)
    with pytest.raises(ValueError, match='dev.parquet .* promises 4000000 numbers'):
        list(parquet_files.images(parquet_files.open_part(tmp_path / 'dev.parquet'), 0, 1))


def test_a_run_is_repeated_to_the_byte(hub, tmp_path, small_shards):
    run(hub, tmp_path / 'a')
    run(hub, tmp_path / 'b', '--workers=1')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
