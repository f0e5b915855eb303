"""Tests of writing files atomically."""

import os
import socket
import subprocess
import sys

import pytest

from tarflow_jax import files, paths


def test_replacing_keeps_the_file_before(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'before')
    with pytest.raises(OSError), files.replacing(path) as file:
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    assert [p.name for p in tmp_path.iterdir()] == ['file'] and path.read_bytes() == b'before'
    with files.replacing(path) as file:
        file.write(b'whole')
    assert [p.name for p in tmp_path.iterdir()] == ['file'] and path.read_bytes() == b'whole'


def test_write_text(tmp_path):
    files.write_text(tmp_path / 'new' / 'page.html', 'é')
    assert (tmp_path / 'new' / 'page.html').read_text(encoding='utf-8') == 'é'
    assert len(list((tmp_path / 'new').iterdir())) == 1


def test_what_killed_writers_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, '-c', ''])
    gone.wait()
    here = socket.gethostname()
    stale = [f'a.json.{here}.{gone.pid}.tmp', f'b.{here}.{os.getpid()}.tmp', 'c.elsewhere.1.tmp']
    kept = [f'a.json.{here}.{os.getppid()}.tmp', 'd.elsewhere.1.tmp', 'e.tmp']
    for name in stale + kept:
        (tmp_path / name).write_text('')
    os.utime(tmp_path / stale[2], (0, 0))
    files.write_text(tmp_path / 'new', '')
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(['new', *kept])


def test_bucket(bucket):
    path = paths.of(bucket) / 'new' / 'file'
    files.write_text(path, 'before')
    with pytest.raises(OSError), files.replacing(path) as file:
        file.write(b'half')
        raise OSError(28, 'No space left on device')
    assert path.read_text() == 'before'
    with files.replacing(path) as file:
        file.write(bytes(6_000_000))  # in several parts
    assert path.read_bytes() == bytes(6_000_000)


def test_replacing_folder(bucket, tmp_path):
    for path in (paths.of(bucket) / 'x', tmp_path / 'x'):
        files.write_text(path / 'old', '')
        with pytest.raises(OSError), files.replacing_folder(path) as folder:
            (folder / 'half').write_text('')
            raise OSError(28, 'No space left on device')
        assert [entry.name for entry in path.iterdir()] == ['old']
        with files.replacing_folder(path) as folder:
            (folder / 'a').write_text('a')
            (folder / 'b').write_text('b')
        assert {entry.name: entry.read_text() for entry in path.iterdir()} == {'a': 'a', 'b': 'b'}
