"""Reads arrays from .npz files, after checking their names, sizes and checksums.

NumPy allocates whatever size a header claims, and a memory map bypasses the checksum of the zip.
"""

import contextlib
import io
import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tarflow_jax.data import zip_files

_CHUNK_BYTES = 2**20


def members(path: str | Path) -> dict[str, zip_files.Member]:
    """Lists the arrays of an .npz by name, without reading them.

    Raises:
        ValueError: the file is not a zip, or is damaged. As in this whole module, the message
            gives the reason without the path.
    """
    found: dict[str, zip_files.Member] = {}
    with open(path, 'rb') as file:
        for member in list(zip_files.members(file)):
            name = member.name.removesuffix('.npy')
            if name in found:
                raise ValueError(f'it contains {name[:60]!r} twice')
            if zip_files.name_at(file, member.offset) != member.name:
                raise ValueError(f'its directory and its member disagree on the name {name!r}')
            found[name] = member
    return found


def read(path: str | Path, member: zip_files.Member) -> np.ndarray:
    """Reads an array as read-only and checks its checksum.

    Raises:
        ValueError: it is damaged, is a decompression bomb, or contains objects.
    """
    with _named(member.name):
        if member.why_not:
            raise ValueError(member.why_not)
        with open(path, 'rb') as file:
            data = zip_files.read(file, member.offset, member.size, member.packed)
        stream = io.BytesIO(data)
        shape, order, dtype = header(stream)
        if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise ValueError(f'has another size than {dtype} {list(shape)} needs')
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order=order)


def mapped(path: str | Path, member: zip_files.Member) -> np.ndarray:
    """Memory-maps an array, or reads it if it is compressed; checks its checksum.

    Raises:
        ValueError: as for `read`.
    """
    if member.packed.method != zip_files.STORED or member.why_not:
        return read(path, member)
    with _named(member.name), open(path, 'rb') as file:
        stream = zip_files.open_member(file, member.offset, member.packed)
        start = file.tell()
        shape, order, dtype = header(stream)
        place = file.tell()
        if member.size != member.packed.size or (
            math.prod(shape) * dtype.itemsize != start + member.size - place
        ):
            raise ValueError(f'has another size than {dtype} {list(shape)} needs')
        file.seek(start)
        left, checksum = member.size, 0
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        if left or checksum != member.packed.crc:
            raise ValueError('is damaged: its checksum differs from that in the zip')
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.memmap(path, dtype, 'r', place, shape, order)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except EOFError:
        raise ValueError(f'{name[:60]}: is truncated') from None
    except ValueError as error:
        raise ValueError(f'{name[:60]}: {error}') from None


def header(stream) -> tuple[tuple[int, ...], str, np.dtype]:
    """Reads the shape, order ('C' or 'F') and dtype of a .npy, up to its first number.

    Raises:
        ValueError: it is damaged, or contains objects.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
        }[version]
        shape, fortran, dtype = read_header(stream)
    except KeyError:
        raise ValueError(f'it has the unknown .npy version {version}') from None
    except ValueError:
        raise
    except Exception as error:  # numpy parses the header as Python
        raise ValueError(f'it has a damaged header ({type(error).__name__})') from None
    if any(type(n) is not int or n < 0 for n in shape) or not dtype.itemsize:
        raise ValueError(f'it contains an array {dtype} {list(shape)}')
    if dtype.hasobject:
        raise ValueError('it contains Python objects, which are not loaded')
    return shape, 'F' if fortran else 'C', dtype
