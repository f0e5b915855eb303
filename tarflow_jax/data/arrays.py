"""Arrays of .npz files: their names, sizes and checksums are compared before they are believed.

NumPy takes room for whatever a header claims, and a memory map goes round the checksum of the zip.
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
    """The arrays of an .npz by their names, without reading them.

    Raises:
        ValueError: it is no zip, or damaged; says what is wrong, not where, as all here.
    """
    found: dict[str, zip_files.Member] = {}
    with open(path, 'rb') as file:
        for member in list(zip_files.members(file)):
            name = member.name.removesuffix('.npy')
            if name in found:
                raise ValueError(f'it holds {name[:60]!r} twice')
            if zip_files.name_at(file, member.offset) != member.name:
                raise ValueError(f'its directory and the file there differ in the name {name!r}')
            found[name] = member
    return found


def read(path: str | Path, member: zip_files.Member) -> np.ndarray:
    """An array, read-only; its checksum is compared.

    Raises:
        ValueError: it is damaged, a decompression bomb, or holds objects.
    """
    with _named(member.name):
        if member.why_not:
            raise ValueError(member.why_not)
        with open(path, 'rb') as file:
            data = zip_files.read(file, member.offset, member.size, member.packed)
        stream = io.BytesIO(data)
        shape, order, dtype = header(stream)
        if math.prod(shape) * dtype.itemsize != len(data) - stream.tell():
            raise ValueError(f'says that it is {dtype} {list(shape)}, and has other bytes')
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.frombuffer(data, dtype, offset=stream.tell()).reshape(shape, order=order)


def mapped(path: str | Path, member: zip_files.Member) -> np.ndarray:
    """An array that stays in the file, unless it is compressed; its checksum is compared.

    Raises:
        ValueError: as `read`.
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
            raise ValueError(f'says that it is {dtype} {list(shape)}, and has other bytes')
        file.seek(start)
        left, checksum = member.size, 0
        while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
            checksum, left = zlib.crc32(chunk, checksum), left - len(chunk)
        if left or checksum != member.packed.crc:
            raise ValueError('is damaged: it has another checksum than the zip says')
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
    """The shape, order ('C' or 'F') and type of a .npy; leaves the stream at its first number.

    Raises:
        ValueError: it is damaged, or of objects.
    """
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0
        }[version]
        shape, fortran, dtype = read_header(stream)
    except KeyError:
        raise ValueError(f'it holds an array of the version {version}') from None
    except ValueError:
        raise
    except Exception as error:  # numpy parses the header as Python
        raise ValueError(f'it holds a damaged header ({type(error).__name__})') from None
    if any(type(n) is not int or n < 0 for n in shape) or not dtype.itemsize:
        raise ValueError(f'it holds an array {dtype} {list(shape)}')
    if dtype.hasobject:
        raise ValueError('it holds objects, which are not loaded')
    return shape, 'F' if fortran else 'C', dtype
