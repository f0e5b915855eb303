"""What lies beside images, or cannot be read, is named and does not stop the rest."""

import os
import sys
import tarfile

import pytest
from prepared_pictures import last_error, manifest, picture, run, save

from tarflow_jax.data import listing

pytestmark = pytest.mark.usefixtures('in_threads')


def notes(out, split='train'):
    return dict(manifest(out)['splits'][split]['notes']['list'])


def test_what_systems_leave_behind_is_ignored(classes, tmp_path):
    junk = ['__MACOSX', '.ipynb_checkpoints', '@eaDir', 'lost+found', '$RECYCLE.BIN']
    for name in junk:
        save(classes / 'train' / name / '1.png', picture(0))
        save(classes / name / '1.png', picture(0))
    (classes / 'train' / 'cat' / 'Thumbs.db').write_text('x')
    run(classes, tmp_path / 'out', '--size=8')
    assert manifest(tmp_path / 'out')['classes'] == ['cat', 'dog']
    found = notes(tmp_path / 'out')
    assert set(found) == {*junk, *(f'train/{name}' for name in junk), 'train/cat/Thumbs.db'}
    assert set(found.values()) == {'is ignored because of its name'}


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='names are UTF-8 elsewhere')
@pytest.mark.parametrize('as_tar', [False, True])
def test_names_that_are_not_utf8(classes, tmp_path, as_tar, capfd):
    with open(os.path.join(os.fsencode(classes), b'train/cat/caf\xe9.png'), 'wb') as file:
        file.write(b'x')
    source = classes
    if as_tar:
        source = tmp_path / 'pets.tar'
        with tarfile.open(source, 'w', format=tarfile.GNU_FORMAT) as tar:
            tar.add(classes, '.')
    run(source, tmp_path / 'out', '--size=8')
    assert notes(tmp_path / 'out') == {
        r'train/cat/caf\xe9.png': 'has a name that is not UTF-8 and was left out'
    }
    run(source, tmp_path / 'strict', '--size=8', '--strict', code=2)
    assert r'caf\xe9.png has a name that is not UTF-8' in last_error(capfd)


def test_folders_that_cannot_be_listed(classes, tmp_path, monkeypatch):
    (classes / 'train' / 'cat' / 'loop').symlink_to(classes / 'train')
    (classes / 'train' / 'cat' / 'self.png').symlink_to('self.png')
    save(classes / 'train' / 'cat' / 'secret' / '1.png', picture(0))
    scandir = os.scandir

    def forbid(folder):
        if str(folder).endswith('secret'):
            raise PermissionError(13, 'Permission denied')
        return scandir(folder)

    monkeypatch.setattr(listing.os, 'scandir', forbid)
    run(classes, tmp_path / 'out', '--size=8')
    assert notes(tmp_path / 'out') == {
        'train/cat/loop': 'is a link to a folder that contains it and was left out',
        'train/cat/secret': 'cannot be read (Permission denied) and was left out',
    }
    entry = manifest(tmp_path / 'out')['splits']['train']
    assert entry['images'] == 6
    assert entry['skipped']['list'] == [
        ['train/cat/self.png', 'is a broken link or not a regular file']
    ]
