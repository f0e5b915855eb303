"""IDX files, the format of MNIST: a short header that gives the shape, then the bytes."""

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
# Images deflate by far less, unless they are few or all the same.
BOMB_BYTES, BOMB_RATIO = 2**28, 100


def read_idx(path):
    """Reads an IDX file of unsigned bytes, gzipped or plain (told apart by content, not by name).

    Args:
        path: the file.

    Returns:
        uint8 array with the 1 to 4 dimensions of the header, `[N]` for labels and `[N,H,W]` for
        images.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not IDX, holds another type than uint8, is empty, shorter or longer
            than its header promises, larger than 4 GiB, or its gzip stream is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there; fetch it or correct the path.')
    with open(path, 'rb') as file:
        zipped = file.read(2) == b'\x1f\x8b'
        file.seek(0)
        try:
            if not zipped:
                return _parse(file, path)
            with gzip.GzipFile(fileobj=file) as unzipped:
                return _parse(unzipped, path)
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f'{path} is damaged: {error}; fetch it again.') from error


def write_idx(path, array):
    """Writes a uint8 array with 1 to 4 dimensions as IDX, gzipped if `path` ends with `.gz`.

    The gzip header holds no time and no name, so equal arrays make equal files.

    Raises:
        ValueError: the array is not uint8, has no elements or no or more than 4 dimensions.
    """
    array = np.asarray(array)
    if array.dtype != np.uint8 or not 1 <= array.ndim <= MAX_DIMS or array.size == 0:
        raise ValueError(
            f'{path} cannot be written from a {array.dtype} array of shape {array.shape}; '
            f'IDX takes uint8 with 1 to {MAX_DIMS} dimensions and at least one element here.'
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
            f'{path} is truncated: an IDX file starts with 4 bytes, {len(magic)} were read; '
            'fetch it again.'
        )
    if magic[:2] != b'\0\0':
        raise ValueError(
            f'{path} is neither IDX nor gzip: it starts with {magic.hex()}, not with 0000 or 1f8b; '
            'fetch it again.'
        )
    if magic[2] != UINT8:
        raise ValueError(
            f'{path} holds IDX type 0x{magic[2]:02x}; only unsigned bytes (0x08) are read, '
            'so convert it.'
        )
    ndim = magic[3]
    if not 1 <= ndim <= MAX_DIMS:
        raise ValueError(
            f'{path} has {ndim} dimensions; labels have 1, images 3 or 4, so fetch it again.'
        )

    sizes = _read_up_to(file, 4 * ndim)
    if len(sizes) < 4 * ndim:
        raise ValueError(
            f'{path} is truncated: its header promises {4 * ndim} bytes of sizes, '
            f'{len(sizes)} were read; fetch it again.'
        )
    shape = struct.unpack(f'>{ndim}I', sizes)
    promised = math.prod(shape)
    if promised == 0:
        raise ValueError(f'{path} is empty: its header gives the shape {shape}; fetch it again.')
    if promised > MAX_BYTES:
        raise ValueError(
            f'{path} is too large: its header promises {promised} bytes (shape {shape}), more '
            'than 4 GiB; fetch it again, or prepare such a set as array_record.'
        )
    held = path.stat().st_size
    if isinstance(file, gzip.GzipFile) and promised > max(BOMB_BYTES, BOMB_RATIO * held):
        raise ValueError(
            f'{path} is a decompression bomb: it promises {promised} bytes (shape {shape}) and has '
            f'{held}; fetch it again.'
        )

    data = _read_up_to(file, promised)
    if len(data) < promised:
        raise ValueError(
            f'{path} is truncated: its header promises {promised} bytes, {len(data)} were read; '
            'fetch it again.'
        )
    try:
        more = file.read1(1)  # reading past the end is also what makes gzip check its CRC
    except EOFError as error:
        raise ValueError(
            f'{path} is truncated: all {promised} promised bytes were read, but its gzip stream '
            'stops before its checksum; fetch it again.'
        ) from error
    if more:
        raise ValueError(
            f'{path} is too long: its header promises {promised} bytes (shape {shape}) and more '
            'follow; fetch it again.'
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(file, limit):
    # Grows with the bytes that are really there, so that a lying header allocates nothing.
    data = bytearray()
    while len(data) < limit:
        try:
            chunk = file.read1(min(limit - len(data), CHUNK_BYTES))
        except EOFError:  # a gzip stream that stops before its end mark
            break
        if not chunk:
            break
        data += chunk
    return data
