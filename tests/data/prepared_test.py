"""The prepared source: what it says of itself, and that it refuses what is damaged."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from prepared_pictures import content, manifest, picture, run, write_batches

import tarflow_jax
from tarflow_jax.data import sources

pytestmark = pytest.mark.usefixtures('in_threads')


@pytest.mark.parametrize('damage, says', [
    (Path.unlink, 'is missing'),
    (lambda path: os.truncate(path, 700), 'has 700 bytes instead of'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1] + b'x'), 'does not match the checksum'),
])
def test_damage_is_seen_and_mended(classes, tmp_path, small_shards, damage, says):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    before = content(out)
    shard = out / 'pets-train.array_record-00001-of-00003'
    damage(shard)
    pattern = f'{re.escape(str(shard))} {says}.* .1 of 3 shards are damaged.; run the command'
    with pytest.raises(ValueError, match=pattern):
        sources.load('prepared', 'train', path=str(out))
    assert len(sources.load('prepared', 'validation', path=str(out))) == 3
    others = {path.name: path.stat().st_mtime_ns for path in out.glob('*0000[02]-of*')}
    run(classes, out, '--size=8')
    assert content(out) == before
    assert others == {path.name: path.stat().st_mtime_ns for path in out.glob('*0000[02]-of*')}


def test_checksums_are_shared_by_processes(classes, tmp_path, small_shards):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    shard = out / 'pets-train.array_record-00001-of-00003'
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + b'x')
    assert len(sources.load('prepared', 'train', path=str(out), verify=(0, 2))) == 6
    with pytest.raises(ValueError, match='00001-of-00003 does not match the checksum'):
        sources.load('prepared', 'train', path=str(out), verify=(1, 2))
    shard.unlink()  # sizes are looked at by all
    with pytest.raises(ValueError, match='is missing'):
        sources.load('prepared', 'train', path=str(out), verify=(0, 2))


def test_manifest_is_damaged_or_of_another_version(classes, tmp_path, capfd):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    path = out / 'manifest.json'
    text = path.read_text()
    path.write_text(text[:100])
    with pytest.raises(ValueError, match='manifest.json is damaged .* prepare the dataset again'):
        sources.load('prepared', 'train', path=str(out))
    path.write_text(text.replace('"format": 1', '"format": 2'))
    with pytest.raises(ValueError, match='has the format 2, but this version reads 1'):
        sources.load('prepared', 'train', path=str(out))


def test_about_and_pickle(classes, tmp_path):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    source = sources.load('prepared', 'train', path=str(out))
    assert source.about == {
        'dataset': 'pets', 'kind': 'photographs/torchvision', 'split': 'train', 'images': 6,
        'skipped': 0, 'classes': 2,
        'image': {'size': 8, 'channels': 3, 'encoding': 'png', 'crop': 'torchvision'},
        'preprocessing': manifest(out)['preprocessing'],
        'manifest_sha256': hashlib.sha256((out / 'manifest.json').read_bytes()).hexdigest(),
    }
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again[5]['image'], picture(5))
    assert again.about == source.about and again.class_names == ['cat', 'dog']
    assert sources.classes('prepared', path=str(out)) == (
        ['cat', 'dog'], 'photographs/torchvision'
    )
    with pytest.raises(FileNotFoundError, match='has no manifest.json; prepare a dataset with'):
        sources.load('prepared', 'train', path=str(tmp_path / 'none'))
    with pytest.raises(FileNotFoundError, match=f'prepare {tmp_path} --out=DIR` and set data.path'):
        sources.load('prepared', 'train', path=str(tmp_path))
    with pytest.raises(ValueError, match="has no split 'test'; choose one of train, validation"):
        sources.load('prepared', 'test', path=str(out))
    with pytest.raises(ValueError, match='data.path is empty'):
        sources.load('prepared', 'test')


def test_other_classes_than_the_model_knows(classes, tmp_path):
    run(classes, tmp_path / 'out', '--size=8')
    source = sources.load('prepared', 'train', path=str(tmp_path / 'out'))
    sizes = dict(image_size=8, channels=3, what='the training set')
    sources.check(source, num_classes=2, **sizes)
    with pytest.raises(ValueError, match='has the label 1, but model.num_classes = 1 allows 0'):
        sources.check(source, num_classes=1, **sizes)
    with pytest.raises(ValueError, match='num_classes = 10, but the training set has 2 classes.* '
                       'set model.num_classes to 2'):
        sources.check(source, num_classes=10, **sizes)


def test_classes_that_only_have_numbers_have_no_names(tmp_path):
    write_batches(tmp_path / 'files')
    run(tmp_path / 'files', tmp_path / 'named', '--split=validation')
    names, kind = sources.classes('prepared', path=str(tmp_path / 'named'))
    assert kind == 'imagenet_resized' and names[9] == 'n00000010'
    (tmp_path / 'files' / 'map_clsloc.txt').unlink()
    run(tmp_path / 'files', tmp_path / 'unnamed', '--split=validation')
    source = sources.load('prepared', 'validation', path=str(tmp_path / 'unnamed'))
    assert source.class_names is None and source.about['classes'] == 1000


READ_WITH_A_WORKER = """
import sys
from tarflow_jax.data import pipeline, sources

def first_batch(workers):
    source = sources.load('prepared', 'train', path=sys.argv[1])
    batches = pipeline.train_batches(source, batch_size=6, seed=0, flip=True, workers=workers)
    print(next(batches)['image'].astype(int).sum((1, 2, 3)).tolist())
    batches.close()

if __name__ == '__main__':
    first_batch(workers=0)
    first_batch(workers=2)
    print([name for name in ('tensorflow', 'torch') if name in sys.modules])
"""


def test_grain_reads_it_in_processes(classes, tmp_path):
    run(classes, tmp_path / 'out', '--size=8')
    (tmp_path / 'read.py').write_text(READ_WITH_A_WORKER)
    environment = {**os.environ, 'PYTHONPATH': str(Path(tarflow_jax.__file__).parents[1])}
    ran = subprocess.run(
        [sys.executable, str(tmp_path / 'read.py'), str(tmp_path / 'out')],
        env=environment, capture_output=True, text=True, timeout=60, check=True,
    )
    in_threads, in_workers, loaded = ran.stdout.splitlines()
    sums = sorted(int(picture(k).sum()) for k in range(6))
    assert sorted(map(int, in_threads[1:-1].split(','))) == sums
    assert in_workers == in_threads
    assert loaded == '[]' and ran.stderr == ''
