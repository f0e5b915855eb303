"""Shards: an interruption changes nothing, damage is mended, and a bucket is a folder too."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import pytest
from prepared_pictures import content, elements, last_error, picture, run, save

import tarflow_jax
from tarflow_jax import paths
from tarflow_jax.data import prepare, shards, sources


@pytest.mark.parametrize('count, per_shard, bounds', [
    (1, 4, [(0, 1)]), (4, 4, [(0, 4)]), (5, 4, [(0, 2), (2, 5)]), (9, 4, [(0, 3), (3, 6), (6, 9)]),
])
def test_shards_are_few_and_equal(count, per_shard, bounds):
    assert shards.bounds(count, per_shard) == bounds


@pytest.mark.parametrize('label, record', [
    (3, '0a220a100a05696d61676512070a050a03706e670a0e0a056c6162656c12051a030a0103'),
    (None, '0a120a100a05696d61676512070a050a03706e67'),
])
def test_records_are_as_the_first_version_wrote_them(label, record):
    assert shards._record(b'png', label, None).hex() == record


def test_interrupt_and_failure_have_codes(classes, tmp_path, monkeypatch, capfd):
    for error, code in ((KeyboardInterrupt(), 130), (OSError('disk full'), 1)):
        def fail(*args, error=error, **kwargs):
            raise error
        monkeypatch.setattr(prepare.shards, 'write', fail)
        run(classes, tmp_path / 'out', '--size=8', code=code)
        assert 'run the same command again to resume' in capfd.readouterr().err
    monkeypatch.undo()

    class FullDisk(shards.array_record_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError('write() failed: No space left on device')

    monkeypatch.setattr(shards.array_record_module, 'ArrayRecordWriter', FullDisk)
    run(classes, tmp_path / 'out', '--size=8', code=1)
    assert 'No space left on device; run the same command again to resume.' in last_error(capfd)
    monkeypatch.undo()
    run(classes, tmp_path / 'out', '--size=8')
    assert len(elements(tmp_path / 'out', 'train')[1]) == 6


SLOWLY = """
import sys, time
from tarflow_jax.data import prepare, shards, splits

splits.SHARD_PIXEL_BYTES = 2 * 8 * 8 * 3
write_shard = shards._write_shard

def slowly(*args):
    time.sleep(0.3)
    return write_shard(*args)

if __name__ == '__main__':
    shards._write_shard = slowly
    sys.exit(prepare.main(sys.argv))
"""


def children(pid):
    found = set()
    for entry in Path('/proc').glob('[0-9]*/stat'):
        try:
            parent = int(entry.read_text().rpartition(')')[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.add(int(entry.parent.name))
    return found


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def as_folder(folder):
    return folder


def as_zip(folder):
    return Path(shutil.make_archive(folder, 'zip', folder))


def as_parquet(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = folder.with_name('rows')
    made.mkdir()
    for split in ('train', 'val'):
        paths = sorted((folder / split).rglob('*.*'))
        rows = {'image': [p.read_bytes() for p in paths], 'label': [p.parent.name for p in paths]}
        pq.write_table(pa.table(rows), made / f'{split}.parquet', row_group_size=5)
    return made


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks into /proc')
@pytest.mark.parametrize('kind', [
    as_folder, pytest.param(as_zip, marks=pytest.mark.slow),
    pytest.param(as_parquet, marks=pytest.mark.slow),
])
def test_killed_and_started_again_is_the_same_to_the_byte(kind, classes, tmp_path, small_shards, capfd):
    for k in range(10, 20):
        save(classes / 'train' / 'dog' / f'{k}.png', picture(k))
    (classes / 'train' / 'cat' / '0words.jpg').write_text('hello')
    source = kind(classes)
    run(source, tmp_path / 'whole', '--size=8')
    out = tmp_path / 'out'
    (tmp_path / 'slowly.py').write_text(SLOWLY)
    environment = {**os.environ, 'PYTHONPATH': str(Path(tarflow_jax.__file__).parents[1])}
    started = subprocess.Popen(
        [sys.executable, str(tmp_path / 'slowly.py'), str(source), f'--out={out}', '--size=8',
         '--workers=2'], env=environment, stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob('progress/*.json'))) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = children(started.pid)
    os.kill(started.pid, signal.SIGKILL)
    assert started.wait(10) == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob('*.array_record-*')}
    assert 3 <= len(kept) < 11 and not (out / 'manifest.json').exists()
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in workers)

    run(source, out, '--size=4', code=2)
    assert 'unfinished preparation with other images or options' in last_error(capfd)
    run(source, out, '--size=8')
    assert 'shards, which are finished' in capfd.readouterr().err
    assert content(out) == content(tmp_path / 'whole')
    untouched = [name for name, when in kept.items() if (out / name).stat().st_mtime_ns == when]
    assert len(untouched) >= 3


def test_mending_from_changed_images_is_refused(classes, tmp_path, small_shards, capfd):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    (out / 'pets-train.array_record-00001-of-00003').unlink()
    place = classes / 'train' / 'cat' / '2.png'
    size = place.stat().st_size
    place.write_bytes(bytes(size))
    run(classes, out, '--size=8', code=2)
    assert 'cannot be reproduced' in last_error(capfd)


def test_bucket(classes, tmp_path, bucket, small_shards, capfd, monkeypatch):
    run(classes, tmp_path / 'local', '--size=8')
    run(classes, bucket, '--size=8')
    written = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths.of(bucket).iterdir()
    }
    assert written == content(tmp_path / 'local')
    run(classes, bucket, '--size=8')
    assert 'is already prepared' in capfd.readouterr().err
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr(tempfile, 'tempdir', None)

    def read(folder):
        source = sources.load('prepared', 'train', path=str(folder))
        images = [source[i] for i in range(len(source))]
        return source.about, [(image['image'].tobytes(), int(image['label'])) for image in images]

    assert read(bucket) == read(tmp_path / 'local')
    [copy] = tmp_path.glob('tarflow_jax-*/*')
    (copy / 'pets-train.array_record-00001-of-00003').write_bytes(b'half')
    assert read(bucket) == read(tmp_path / 'local')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=0))
    (copy / 'pets-train.array_record-00001-of-00003').unlink()
    with pytest.raises(OSError, match='^gs://.* random access, .* set TMPDIR to a folder'):
        sources.load('prepared', 'train', path=bucket)
    with pytest.raises(ValueError, match='is in a bucket, which does not allow random access'):
        sources.load('idx', 'train', path=bucket)


def test_bucket_without_its_package(classes, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    run(classes, 'gs://bucket/pets', '--size=8', code=2)
    assert 'pip install gcsfs' in last_error(capfd)
