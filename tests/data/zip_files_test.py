"""Zips: their images are those of the folder, and hostile ones are refused at once."""

import io
import os
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from prepared_pictures import content, elements, encoded, last_error, manifest, picture, run

from tarflow_jax.data import zip_files

pytestmark = pytest.mark.usefixtures('in_threads')


def zip_folder(folder, path, method, name='pets/'):
    with zipfile.ZipFile(path, 'w', method) as archive:
        for file in sorted(folder.rglob('*')):
            archive.write(file, f'{name}{file.relative_to(folder)}')
    return path


@pytest.mark.parametrize('method', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('name', ['', 'pets/', 'data/pets/'])
def test_zip_equals_folder(classes, tmp_path, method, name):
    run(classes, tmp_path / 'a', '--size=8')
    run(zip_folder(classes, tmp_path / 'pets.zip', method, name), tmp_path / 'b', '--size=8')
    for split in ('train', 'validation'):
        for a, b in zip(elements(tmp_path / 'a', split), elements(tmp_path / 'b', split)):
            np.testing.assert_array_equal(a, b)
    assert manifest(tmp_path / 'b')['dataset'] == 'pets'


def test_a_folder_of_zips(classes, tmp_path):
    folder = tmp_path / 'zips'
    folder.mkdir()
    for split in ('train', 'val'):
        zip_folder(classes / split, folder / f'{split}.zip', zipfile.ZIP_DEFLATED, f'{split}/')
    run(folder, tmp_path / 'out', '--size=8')
    assert elements(tmp_path / 'out', 'train')[1] == [0, 0, 0, 0, 1, 1]
    assert elements(tmp_path / 'out', 'validation')[1] == [0, 1, 1]


def test_a_zip_among_images_is_left_alone(tmp_path):
    folder = tmp_path / 'train'
    folder.mkdir()
    (folder / '1.png').write_bytes(encoded(picture(1)))
    with zipfile.ZipFile(folder / 'all.zip', 'w') as archive:
        archive.writestr('cat/2.png', encoded(picture(2)))
    run(folder, tmp_path / 'out', '--size=8', '--name=x')
    entry = manifest(tmp_path / 'out')['splits']['train']
    assert entry['images'] == 1 and entry['skipped']['list'][0][0] == 'all.zip'


def test_zip64_and_names(tmp_path):
    path = tmp_path / 'train.zip'
    with zipfile.ZipFile(path, 'w') as archive:
        with archive.open(zipfile.ZipInfo('cat/ä.png'), 'w', force_zip64=True) as member:
            member.write(encoded(picture(0)))
        archive.writestr('dog\\1.png', encoded(picture(1)))
    run(path, tmp_path / 'out', '--size=8')
    assert manifest(tmp_path / 'out')['classes'] == ['cat', 'dog']
    with open(path, 'rb') as file:
        assert [member.name for member in zip_files.members(file)] == ['cat/ä.png', 'dog/1.png']


def test_what_cannot_be_read_is_named(tmp_path, capfd):
    path = tmp_path / 'train.zip'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        for k in range(3):
            archive.writestr(f'cat/{k}.png', encoded(picture(k)))
        archive.writestr('cat/l.png', encoded(picture(9)), zipfile.ZIP_BZIP2)
        archive.writestr('cat/z.bmp', b'BM' + bytes(2**27))
        archive.writestr('__MACOSX/cat/._1.png', b'x')
        archive.writestr('__MACOSX/cat/1.png', b'x')
    data = bytearray(path.read_bytes())
    data[data.index(b'cat/1.png') + 30] ^= 255  # in the image
    entry = data.rindex(b'PK\x01\x02', 0, data.rindex(b'cat/2.png'))
    data[entry + 8] |= 1
    path.write_bytes(data)
    run(path, tmp_path / 'out', '--size=8')
    entry = manifest(tmp_path / 'out')['splits']['train']
    assert entry['images'] == 1
    skipped, notes = dict(entry['skipped']['list']), dict(entry['notes']['list'])
    assert skipped['cat/1.png'].startswith('is damaged: ')
    assert skipped['cat/z.bmp'].startswith('is a decompression bomb: ')
    assert notes == {
        '__MACOSX': 'is ignored because of its name',
        'cat/2.png': 'is encrypted and was left out',
        'cat/l.png': 'is compressed by method 12, but only stored and deflated files are supported and '
                     'was left out',
    }
    run(path, tmp_path / 'strict', '--size=8', '--strict', code=2)
    assert 'does not pass --strict' in last_error(capfd)


def raw_zip(members=((b'a/1.png', 0, 4, 4, 0),), body=b'\0' * 100, **end):
    """A zip by hand: members are (name, method, packed size, size, offset)."""
    directory = b''.join(
        struct.pack('<4s6H3I5H2I', b'PK\x01\x02', 20, 20, 0, method, 0, 0, 0, packed, size,
                    len(name), 0, 0, 0, 0, 0, offset) + name
        for name, method, packed, size, offset in members
    )
    values = {'entries': len(members), 'size': len(directory), 'offset': len(body), **end}
    return body + directory + struct.pack(
        '<4s4H2IH', b'PK\x05\x06', 0, 0, values['entries'], values['entries'], values['size'],
        values['offset'], 0,
    )


@pytest.mark.parametrize('data, says', [
    (raw_zip()[:-30], 'has no directory at its end'),
    (raw_zip(offset=2**31), 'directory is beyond its end'),
    (raw_zip(size=2**31), 'directory is beyond its end'),
    (raw_zip(offset=90), 'directory is damaged'),
    (raw_zip(entries=7), 'claims another number of files than it has'),
    (raw_zip([(b'a/1.png', 8, 2**31, 4, 0)]), "member 'a/1.png' is beyond its end"),
    (raw_zip([(b'a/1.png', 8, 4, 4, 2**31)]), "member 'a/1.png' is beyond its end"),
    (raw_zip([(b'a/%d.png' % k, 8, 60, 2**30, 0) for k in range(1000)]), 'its members overlap'),
])
def test_hostile_directories(tmp_path, data, says, capfd):
    (tmp_path / 'train.zip').write_bytes(b'PK\x03\x04' + data[4:])
    tracemalloc.start()
    run(tmp_path / 'train.zip', tmp_path / 'out', code=2)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    said = last_error(capfd)
    assert f'{tmp_path / "train.zip"} is damaged or not a zip' in said and says in said


def test_streams_are_read_in_any_steps():
    data = np.random.default_rng(0).integers(0, 4, 10**6, np.uint8).tobytes()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        saved = io.BytesIO()
        with zipfile.ZipFile(saved, 'w', method) as archive:
            archive.writestr('first', data)
            archive.writestr('second', data[:99])
        saved.seek(0)
        found = {}
        for name, stream in zip_files.stream_members(saved):
            stream.skip(1000)
            found[name] = stream.read(10) + stream.read(70_000)
            assert stream.read(0) == b''
        assert found == {'first': data[1000:71_010], 'second': b''}


def test_a_member_that_is_not_what_it_says():
    packed = zlib.compress(bytes(1000), wbits=-15)
    file = io.BytesIO(struct.pack('<4s5H3I2H', b'PK\x03\x04', 20, 0, 8, 0, 0, 0, 0, 0, 0, 0) + packed)
    right = zip_files.Packed(8, len(packed), zlib.crc32(bytes(1000)))
    assert zip_files.read(file, 0, 1000, right) == bytes(1000)
    for size in (999, 1001):
        with pytest.raises(ValueError, match='checksum differs'):
            zip_files.read(file, 0, size, right)
    with pytest.raises(ValueError, match='a decompression bomb: .* bytes unpack to 1073741824'):
        zip_files.read(file, 0, 2**30, right)
    with pytest.raises(ValueError, match='a place without a file'):
        zip_files.read(file, 5, 1000, right)


def test_a_run_is_repeated_to_the_byte(classes, tmp_path, small_shards):
    path = zip_folder(classes, tmp_path / 'pets.zip', zipfile.ZIP_DEFLATED)
    run(path, tmp_path / 'a', '--size=8')
    run(path, tmp_path / 'b', '--size=8', '--workers=1')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize('name, wrong, says', [
    (b'1.png', b'1.pnf', 'train/cat/1.pnf is damaged: its name is train/cat/1.png in the zip; skipped'),
    (b'cat/1.png', b'dog/1.png', 'train/dog/1.png is damaged: its name is train/cat/1.png in the zip'),
    (b'cat/1.png', b'cau/1.png', "its directory has 'train/cau/1.png' for 'train/cat/1.png'"),
])
def test_a_flipped_bit_in_a_name(tmp_path, name, wrong, says, capfd):
    path = tmp_path / 'pets.zip'
    with zipfile.ZipFile(path, 'w') as file:
        for k in range(3):
            file.writestr(f'train/cat/{k}.png', encoded(picture(k)))
            file.writestr(f'train/dog/{k + 3}.png', encoded(picture(k + 3)))
    content = path.read_bytes()
    first, _, second = content.rpartition(name)  # in the directory
    path.write_bytes(first + wrong + second)
    refused = 'for' in says
    run(path, tmp_path / 'out', '--size=8', code=2 if refused else 0)
    assert says in capfd.readouterr().err
    if not refused:
        assert manifest(tmp_path / 'out')['splits']['train']['images'] == 5
        assert manifest(tmp_path / 'out')['classes'] == ['cat', 'dog']
