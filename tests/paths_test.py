"""Paths: what users write becomes a path on the disk or in a bucket, or one sentence."""

import os
import socket
import sys
import time
from pathlib import Path

import bucket_emulator
import pytest

from tarflow_jax import files, paths

B = f'gs://{bucket_emulator.BUCKET}'


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/of')
    (tmp_path / 'file').write_text('')
    return tmp_path


@pytest.mark.parametrize('given, wanted', [
    ('~/x', '/home/of/x'), ('~', '/home/of'), ('x/', '{here}/x'), ('x//y/./z/', '{here}/x/y/z'),
    ('/a/', '/a'), ('.', '{here}'), ('a b/é', '{here}/a b/é'), ('x~', '{here}/x~'),
    ('./gs:/x', '{here}/gs:/x'), ('gs://abc', 'gs://abc'), ('gs://abc/', 'gs://abc'),
    ('gs://abc/r/', 'gs://abc/r'), ('gs://a-b_c.d/r//s/./t/../u', 'gs://a-b_c.d/r/s/u'),
    ('gs://abc/~/x', 'gs://abc/~/x'), ('gs://abc/../..', 'gs://abc'),
])
def test_what_a_path_means(here, given, wanted):
    found = paths.resolved(given, '--workdir')
    assert found == wanted.format(here=here)
    assert paths.resolved(found, '--workdir') == found
    assert os.fspath(paths.of(found)) == found
    assert paths.in_bucket(found) == found.startswith('gs:')


@pytest.mark.parametrize('given, kind, reason', [
    ('gs:/abc/r', 'any', 'write buckets as gs://BUCKET/FOLDER'),
    ('s3://abc/r', 'any', 'is neither a path on disk nor in a bucket of Google Cloud Storage'),
    ('file:///r', 'any', 'is neither a path on disk nor'),
    ('gs://', 'any', "has the invalid bucket name ''; use at least 3 characters"),
    ('gs:///r', 'any', "has the invalid bucket name ''"),
    ('gs://Ab/r', 'any', "has the invalid bucket name 'Ab'"),
    ('gs://abc/r*', 'any', "has the character '*'"),
    ('gs://abc/r\n', 'any', r"has the character '\n'"),
    ('~nobody-of-this-name/x', 'any', "there is no user 'nobody-of-this-name'"),
    ('file', 'folder', 'is a file, not a folder; pass a folder.'),
    ('file/', 'folder', 'is a file, not a folder; pass a folder.'),
    ('.', 'file', 'is a folder, not a file; pass a file.'),
    ('x\0y', 'any', 'has a null character'),
])
def test_what_is_no_path(here, given, kind, reason):
    with pytest.raises(ValueError) as error:
        paths.resolved(given, f'--workdir={given}', kind)
    assert reason in str(error.value) and str(error.value).lstrip("'").startswith('--workdir=')


def test_buckets_need_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gcsfs', None)
    with pytest.raises(ValueError, match='gs://abc/r is in a bucket, but the package .* gcsfs'):
        paths.of('gs://abc/r')


def test_a_bucket_that_can_be_used(bucket):
    paths.reach(bucket, '--workdir', write=True)
    assert not paths.of(bucket).exists()  # nothing was written


def test_a_bucket_that_is_missing(emulator):
    with pytest.raises(ValueError, match='^--workdir: the bucket no-such-bucket does not exist; create'):
        paths.reach('gs://no-such-bucket/r', '--workdir', write=True)


def test_a_bucket_that_cannot_be_written(bucket, monkeypatch):
    granted = {'storage.objects.get', 'storage.objects.list'}
    monkeypatch.setattr(bucket_emulator.Handler, 'granted', granted)
    paths.reach(bucket, '--input', write=False)
    with pytest.raises(ValueError) as error:
        paths.reach(bucket, '--workdir', write=True)
    assert str(error.value).startswith(
        f'--workdir: the bucket {bucket_emulator.BUCKET} does not grant storage.objects.create, '
        'storage.objects.delete, storage.buckets.get to this account; grant it roles/'
    )


def test_a_file_where_a_folder_of_a_bucket_is_meant(bucket):
    files.write_text(bucket, 'x')
    with pytest.raises(ValueError, match='^--workdir is a file, not a folder; pass a folder.$'):
        paths.reach(bucket, '--workdir', write=True)


def test_no_credentials(emulator, monkeypatch, tmp_path):
    monkeypatch.delenv('STORAGE_EMULATOR_HOST')
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(ValueError, match='^--workdir: there are no credentials for buckets'):
        paths.reach(B, '--workdir', write=True)


@pytest.mark.parametrize('answers, why', [
    (False, r'\[Errno 111\] Connection refused'), (True, r'Read timed out. \(read timeout=0.5'),
], ids=['refused', 'silent'])
def test_a_host_that_does_not_answer(monkeypatch, answers, why):
    monkeypatch.setattr(paths, 'TIMEOUT', (0.5, 0.5))
    with socket.socket() as listening:
        listening.bind(('localhost', 0))
        if answers:  # to the connection, and then says nothing
            listening.listen()
        host = f'http://localhost:{listening.getsockname()[1]}'
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', host)
        start = time.monotonic()
        with pytest.raises(ValueError, match=rf'^--workdir: {host} does not answer \({why}\); check'):
            paths.reach(B, '--workdir', write=True)
        assert time.monotonic() - start < 5


def test_local_copies(bucket, tmp_path):
    assert paths.local_copy(str(tmp_path)) == tmp_path
    with pytest.raises(FileNotFoundError, match=f'{bucket} does not exist'):
        paths.local_copy(bucket)
    files.write_text(f'{bucket}/sub/a.txt', 'before')
    one = paths.local_copy(f'{bucket}/sub/a.txt')
    assert one.name == 'a.txt' and paths.local_copy(f'{bucket}/sub/a.txt') == one
    files.write_text(f'{bucket}/sub/a.txt', 'and after')
    assert paths.local_copy(f'{bucket}/sub/a.txt').read_text() == 'and after'
    assert isinstance(one, Path)


def test_remove_tree(bucket, tmp_path):
    for folder in (bucket, str(tmp_path / 'new')):
        files.write_text(f'{folder}/a/b', 'x')
        paths.remove_tree(paths.of(folder) / 'a')
        paths.remove_tree(paths.of(folder) / 'a')
        assert not (paths.of(folder) / 'a').exists()


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    assert paths.writable_folder(tmp_path / 'a' / 'b', '--out') == tmp_path / 'a' / 'b'
    (tmp_path / 'c').mkdir()
    paths.writable_folder(tmp_path / 'c', '--out')
    assert sorted(tmp_path.rglob('*')) == [tmp_path / 'c']


@pytest.mark.parametrize('name, says', [
    ('file', 'is not a folder'), ('file/below', 'file is not a folder'), ('x' * 300, 'too long'),
    ('a/' + 'x' * 300, 'too long'), ('nul\0', 'null'),
])
def test_a_folder_that_cannot_be(tmp_path, name, says):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(ValueError) as error:
        paths.writable_folder(tmp_path / name, '--workdir=W')
    assert str(error.value).startswith('--workdir=W: ') and says in str(error.value)
    assert str(error.value).endswith('; choose another folder.')
    assert [path.name for path in tmp_path.iterdir()] == ['file']
