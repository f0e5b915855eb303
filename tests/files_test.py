"""Files that are there whole or not at all."""

import os
import socket
import subprocess
import sys

import pytest

from tarflow_jax import files


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


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    files.try_folder(tmp_path / 'a' / 'b', '--out')
    (tmp_path / 'c').mkdir()
    files.try_folder(tmp_path / 'c', '--out')
    assert sorted(tmp_path.rglob('*')) == [tmp_path / 'c']


@pytest.mark.parametrize('name, says', [
    ('file', 'is not a folder'), ('file/below', 'file is not a folder'), ('x' * 300, 'too long'),
    ('a/' + 'x' * 300, 'too long'), ('nul\0', 'null'),
])
def test_a_folder_that_cannot_be(tmp_path, name, says):
    (tmp_path / 'file').write_text('mine')
    with pytest.raises(ValueError) as error:
        files.try_folder(tmp_path / name, '--workdir')
    assert str(error.value).startswith(f'--workdir={tmp_path}') and says in str(error.value)
    assert str(error.value).endswith('; choose another folder.')
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_names_that_a_run_needs(tmp_path):
    files.check_workdir(tmp_path / 'new')
    (tmp_path / 'samples').write_text('mine')
    with pytest.raises(ValueError, match=f'{tmp_path}/samples is no folder, and the run needs a'):
        files.check_workdir(tmp_path)
    (tmp_path / 'samples').unlink()
    (tmp_path / 'evaluation.json').mkdir()
    with pytest.raises(ValueError, match='evaluation.json is no file, .* move it away'):
        files.check_workdir(tmp_path)


def test_more_than_a_disk_holds(tmp_path):
    files.check_size(tmp_path / 'new', 1000, 'the images')
    with pytest.raises(ValueError, match=r'the images need 1,000,000,000 GB, and the file system of'):
        files.check_size(tmp_path / 'new', 10**18, 'the images')
