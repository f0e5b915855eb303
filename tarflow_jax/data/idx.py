"""Reads and writes IDX files, the format of MNIST: a short header with the shape, then bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from tarflow_jax import files

UINT8 = 0x08
MAX_DIMS = 4
MAX_BYTES = 4 * 2**30
CHUNK_BYTES = 2**20
# Real images compress by much less, unless they are few or all equal.
BOMB_BYTES, BOMB_RATIO = 2**28, 100


def read_idx(path):
    """Reads an IDX file of unsigned bytes, gzipped or plain (detected by content, not by name).

    Args:
        path: the file.

    Returns:
        uint8 array with the 1 to 4 dimensions in the header, `[N]` for labels and `[N,H,W]` for
        images.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not IDX, is not uint8, is empty, is shorter or longer than its
            header says, is larger than 4 GiB, or its gzip stream is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} does not exist; download it or correct the path.')
    with open(path, 'rb') as file:
        zipped = file.read(2) == b'\x1f\x8b'
        file.seek(0)
        try:
            if not zipped:
                return _parse(file, path)
            with gzip.GzipFile(fileobj=file) as unzipped:
                return _parse(unzipped, path)
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f'{path} is damaged: {error}; download it again.') from error


def write_idx(path, array):
    """Writes a uint8 array with 1 to 4 dimensions as IDX, gzipped if `path` ends with `.gz`.

    The gzip header has no time and no name, so equal arrays give equal files.

    Raises:
        ValueError: the array is not uint8, is empty, or does not have 1 to 4 dimensions.
    """
    array = np.asarray(array)
    if array.dtype != np.uint8 or not 1 <= array.ndim <= MAX_DIMS or array.size == 0:
        raise ValueError(
            f'{path} cannot be written from a {array.dtype} array of shape {array.shape}; IDX '
            f'needs uint8 with 1 to {MAX_DIMS} dimensions and at least one element.'
        )
    header = struct.pack(f'>BBBB{array.ndim}I', 0, 0, UINT8, array.ndim, *array.shape)
    with files.replacing(path) as file:
        if not str(path).endswith('.gz'):
            file.write(header + array.tobytes())
            return
        with gzip.GzipFile(filename='', mode='wb', fileobj=file, mtime=0) as zipped:
            zipped.write(header + array.tobytes())


def _parse(file, path):
    magic = _read_up_to(file, 4)
    if len(magic) < 4:
        raise ValueError(
            f'{path} is truncated: an IDX header needs 4 bytes, but it has {len(magic)}; '
            'download it again.'
        )
    if magic[:2] != b'\0\0':
        raise ValueError(
            f'{path} is neither IDX nor gzip: it starts with {magic.hex()}, not with 0000 or 1f8b; '
            'download it again.'
        )
    if magic[2] != UINT8:
        raise ValueError(
            f'{path} has IDX type 0x{magic[2]:02x}, but only unsigned bytes (0x08) are supported; '
            'convert it.'
        )
    ndim = magic[3]
    if not 1 <= ndim <= MAX_DIMS:
        raise ValueError(
            f'{path} has {ndim} dimensions, but labels have 1 and images 3 or 4; download it again.'
        )

    sizes = _read_up_to(file, 4 * ndim)
    if len(sizes) < 4 * ndim:
        raise ValueError(
            f'{path} is truncated: its header needs {4 * ndim} bytes of sizes, but it has '
            f'{len(sizes)}; download it again.'
        )
    shape = struct.unpack(f'>{ndim}I', sizes)
    promised = math.prod(shape)
    if promised == 0:
        raise ValueError(f'{path} is empty: its header has the shape {shape}; download it again.')
    if promised > MAX_BYTES:
        raise ValueError(
            f'{path} is too large: its header promises {promised} bytes (shape {shape}), more '
            'than 4 GiB; download it again, or prepare the dataset as array_record.'
        )
    held = path.stat().st_size
    if isinstance(file, gzip.GzipFile) and promised > max(BOMB_BYTES, BOMB_RATIO * held):
        raise ValueError(
            f'{path} is a decompression bomb: it promises {promised} bytes (shape {shape}) but has '
            f'{held}; download it again.'
        )

    data = _read_up_to(file, promised)
    if len(data) < promised:
        raise ValueError(
            f'{path} is truncated: its header promises {promised} bytes, but it has {len(data)}; '
            'download it again.'
        )
    try:
        more = file.read1(1)  # reading past the end also makes gzip check its CRC
    except EOFError as error:
        raise ValueError(
            f'{path} is truncated: it has all {promised} promised bytes, but its gzip stream '
            'stops before its checksum; download it again.'
        ) from error
    if more:
        raise ValueError(
            f'{path} is too long: its header promises {promised} bytes (shape {shape}), but more '
            'follow; download it again.'
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(file, limit):
    # Memory grows with the bytes actually read, so a wrong header allocates nothing.
    data = bytearray()
    while len(data) < limit:
        try:
            chunk = file.read1(min(limit - len(data), CHUNK_BYTES))
        except EOFError:  # the gzip stream is truncated
            break
        if not chunk:
            break
        data += chunk
    return data
