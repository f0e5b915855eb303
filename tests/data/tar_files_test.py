"""Tars that lie about themselves are refused, at once and in one sentence."""

import gzip
import tarfile

import numpy as np
import pytest
from prepared_pictures import last_error, pack, run

from tarflow_jax.data import tar_files

pytestmark = pytest.mark.usefixtures('in_threads')


def with_size(data, name, size):
    """The tar with the size of a member changed, and its checksum made right."""
    at = data.index(name)
    header = bytearray(data[at:at + 512])
    header[124:136] = size
    header[148:156] = b' ' * 8
    header[148:156] = b'%06o\0 ' % sum(header)
    return data[:at] + bytes(header) + data[at + 512:]


def negative(number):
    return b'\xff' + (256**11 + number).to_bytes(11, 'big')


def big(number):
    return b'\x80' + number.to_bytes(11, 'big')


def long_name(size):
    info = tarfile.TarInfo('././@LongLink')
    info.type = tarfile.GNUTYPE_LONGNAME
    return with_size(info.tobuf(tarfile.GNU_FORMAT), b'././@LongLink', size) + bytes(512)


@pytest.mark.parametrize('change, says', [
    (lambda data: with_size(data, b'train/cat/2.png', negative(-512)), 'damaged'),
    (lambda data: with_size(data, b'train/cat/2.png', negative(-2**40)), 'damaged'),
    (lambda data: with_size(data, b'train/cat/2.png', big(2**62)), 'truncated'),
    (lambda data: data.replace(b'train/cat/2.png', b'train/cat/X.png'), 'header at byte'),
    (lambda data: data[:data.index(b'train/cat/2.png')], 'its end marker is missing'),
    (lambda data: data[:data.index(b'train/cat/2.png')] + bytes(512)
     + data[data.index(b'train/cat/2.png') + 512:], 'is zeros, but more follows'),
    (lambda data: data + data, 'is zeros, but more follows'),
    (lambda data: long_name(big(2**40)) + data, 'a header claims to have 1099511627776 bytes'),
    (lambda data: long_name(negative(-512)) + data, 'damaged'),
    (lambda data: long_name(big(512)) * 3000 + data, 'damaged'),
])
def test_hostile_tars(classes, tmp_path, change, says, capfd):
    path = tmp_path / 'pets.tar'
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        tar.add(classes / 'train', 'train')
    path.write_bytes(change(path.read_bytes()))
    run(path, tmp_path / 'out', '--size=8', code=2)
    said = last_error(capfd)
    assert f'{path} is damaged or not a tar (' in said and says in said


def test_a_tar_within_a_tar_ends_within_it(classes, tmp_path, capfd):
    (tmp_path / 'cat').mkdir()
    for name in ('a', 'b'):
        pack(classes / 'train' / 'cat', tmp_path / 'cat' / f'{name}.tar')
    path = pack(tmp_path / 'cat', tmp_path / 'train.tar')
    run(path, tmp_path / 'good', '--size=8')
    data = path.read_bytes()
    path.write_bytes(with_size(data, b'./b.tar', b'%011o\0' % 1536))
    run(path, tmp_path / 'out', '--size=8', code=2)
    assert 'train.tar is damaged or not a tar' in last_error(capfd)


def test_flipped_bits_of_a_tar(tmp_path):
    rng = np.random.default_rng(0)
    for k in range(20):
        (tmp_path / 'files').mkdir(exist_ok=True)
        (tmp_path / 'files' / f'{k}.bin').write_bytes(rng.bytes(700))
    whole = pack(tmp_path / 'files', tmp_path / 'files.tar').read_bytes()
    path = tmp_path / 'x.tar'

    def names(data):
        path.write_bytes(data)
        with open(path, 'rb') as file:
            return [(m.name, m.size, m.offset_data) for m in tar_files.members(file, 0, len(data))]

    def contents(data):
        path.write_bytes(data)
        return list(tar_files.gzipped(path, 10**6, lambda name: True))

    for read, data in ((names, whole), (contents, gzip.compress(whole, mtime=0))):
        wanted, refused = read(data), 0
        headers = [k for k in range(0, len(data), 512) if data[k + 257 : k + 262] == b'ustar']
        for _ in range(60):
            flipped = bytearray(data)
            place = rng.integers(len(data)) if not headers else rng.choice(headers) + rng.integers(512)
            flipped[place] ^= 1 << rng.integers(8)
            try:
                assert read(flipped) == wanted
            except ValueError:
                refused += 1
        assert refused > 50
