"""IDX files: the round trip, and one test for each way in which a file can lie."""

import gzip
import re
import struct
import tracemalloc

import numpy as np
import pytest

from tarflow_jax.data.idx import read_idx, write_idx

IMAGES = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)


def idx_bytes(array):
    sizes = struct.pack(f'>{array.ndim}I', *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def refusal(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_idx(path)
    message = str(error.value)
    assert message.startswith(str(path)) and '\n' not in message
    return message


@pytest.mark.parametrize('name', ['images', 'images.gz'])
@pytest.mark.parametrize('shape', [(7,), (2, 3), (2, 3, 5), (2, 3, 5, 3)])
def test_round_trip(tmp_path, name, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    write_idx(tmp_path / name, array)
    read = read_idx(tmp_path / name)
    assert read.dtype == np.uint8 and read.shape == shape
    np.testing.assert_array_equal(read, array)


def test_writes_the_documented_bytes(tmp_path):
    write_idx(tmp_path / 'plain', IMAGES)
    assert (tmp_path / 'plain').read_bytes() == idx_bytes(IMAGES)


def test_gzip_depends_on_the_array_alone(tmp_path):
    write_idx(tmp_path / 'one.gz', IMAGES)
    write_idx(tmp_path / 'two.gz', IMAGES)
    one = (tmp_path / 'one.gz').read_bytes()
    assert one == (tmp_path / 'two.gz').read_bytes()
    assert one[3] == 0  # flags: no file name follows
    assert one[4:8] == b'\0\0\0\0'  # time
    assert gzip.decompress(one) == idx_bytes(IMAGES)


def test_gzip_is_told_by_content(tmp_path):
    (tmp_path / 'zipped').write_bytes(gzip.compress(idx_bytes(IMAGES)))
    (tmp_path / 'plain.gz').write_bytes(idx_bytes(IMAGES))
    np.testing.assert_array_equal(read_idx(tmp_path / 'zipped'), IMAGES)
    np.testing.assert_array_equal(read_idx(tmp_path / 'plain.gz'), IMAGES)


@pytest.mark.parametrize('array', [
    np.zeros((2, 2), np.float32),
    np.zeros((2, 0), np.uint8),
    np.uint8(3),
    np.zeros((1,) * 5, np.uint8),
])
def test_refuses_to_write_what_it_could_not_read(tmp_path, array):
    with pytest.raises(ValueError, match='cannot be written'):
        write_idx(tmp_path / 'file', array)
    assert not (tmp_path / 'file').exists()


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent does not exist'):
        read_idx(tmp_path / 'absent')


@pytest.mark.parametrize('zipped', [False, True])
@pytest.mark.parametrize('content, says', [
    (b'', '4 bytes, but it has 0'),
    (b'\0\0\x08', '4 bytes, but it has 3'),
    (b'PNG\0more', 'neither IDX nor gzip: it starts with 504e4700'),
    (b'\0\0\x0d\x03' + bytes(30), 'IDX type 0x0d'),
    (b'\0\0\x08\0', 'has 0 dimensions'),
    (b'\0\0\x08\x05' + bytes(30), 'has 5 dimensions'),
    (b'\0\0\x08\x03\0\0\0\x02\0', 'needs 12 bytes of sizes, but it has 5'),
    (b'\0\0\x08\x02' + struct.pack('>2I', 0, 2), 'is empty: its header has the shape (0, 2)'),
    (idx_bytes(IMAGES)[:-4], 'promises 30 bytes, but it has 26; download it again'),
    (idx_bytes(IMAGES) + b'x', 'is too long: its header promises 30 bytes'),
])
def test_refuses(tmp_path, content, says, zipped):
    assert says in refusal(tmp_path / 'file', gzip.compress(content) if zipped else content)


def test_refuses_damaged_gzip(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 50, 50), np.uint8)
    good = gzip.compress(idx_bytes(noise))
    cut = refusal(tmp_path / 'cut.gz', good[:5000])
    promised, read = [int(word) for word in re.findall(r'\d+', cut.rpartition('promises')[2])]
    assert 'is truncated' in cut and promised == 10_000 and 4000 < read < 5000
    assert 'stops before its checksum' in refusal(tmp_path / 'tail.gz', good[:-6])
    assert 'CRC check failed' in refusal(tmp_path / 'crc.gz', good[:-8] + bytes(4) + good[-4:])
    assert 'is damaged' in refusal(tmp_path / 'garbage.gz', good + b'garbage')
    assert 'is damaged' in refusal(tmp_path / 'flip.gz', good[:10] + b'\xff' * 40 + good[50:])


def test_a_bomb_is_not_unpacked(tmp_path):
    with gzip.open(tmp_path / 'bomb.gz', 'wb') as file:
        file.write(b'\0\0\x08\x03' + struct.pack('>3I', 2**15, 100, 100))
        file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match='bomb.gz is a decompression bomb: it promises 327680000'):
        read_idx(tmp_path / 'bomb.gz')
    assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize('sizes, says', [
    ((2**32 - 1,) * 4, 'is too large: its header promises 340282366604025813516997721482669850625'),
    ((4 * 2**20, 32, 32, 1), '4294967296 bytes, but it has 0'),
])
def test_a_hostile_header_allocates_nothing(tmp_path, sizes, says):
    path = tmp_path / 'hostile'
    path.write_bytes(b'\0\0\x08\x04' + struct.pack('>4I', *sizes))
    tracemalloc.start()
    with pytest.raises(ValueError) as error:
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert says in str(error.value)
    assert peak < 4 * 2**20
