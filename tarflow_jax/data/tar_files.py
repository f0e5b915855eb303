"""Lists the members of a tar with `tarfile`, and adds the checks that `tarfile` lacks."""

import contextlib
import gzip
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

_BLOCK = 512
_MAX_HEADER_BYTES = 2**20  # limit for a long name or the attributes of a member
_MAX_END_BYTES = 2**26
_CHUNK_BYTES = 2**20


def members(file: BinaryIO, start: int, stop: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of the tar in bytes [start, stop) of a file, with offsets in the file.

    Raises:
        ValueError: the tar is damaged or truncated, or has data after its end.
    """
    file.seek(start)
    try:
        # tarfile starts at the current position of the file; its offsets are those of the file.
        with tarfile.TarFile(fileobj=_Headers(file, stop)) as tar:
            while (member := tar.next()) is not None:
                name = member.name[:200]
                if member.size < 0:
                    raise ValueError(f'its member {name!r} has the size {member.size}')
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > stop:
                        raise ValueError(f'it is truncated within its member {name!r}')
                yield member
                tar.members.clear()  # a million members would need a gigabyte
            end = tar.offset
    except (tarfile.TarError, ArithmeticError, LookupError, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    _check_end(file, end, stop)


def gzipped(path: Path, limit: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Yields name and contents of the wanted files in a small tar.gz.

    Raises:
        ValueError: it is damaged, is not a tar.gz, or unpacks to more than `limit` bytes.
    """
    try:
        with contextlib.ExitStack() as stack:
            limited = _Limited(stack.enter_context(open(path, 'rb')), limit)
            for member in (tar := stack.enter_context(tarfile.open(fileobj=limited, mode='r|'))):
                if wanted(member.name) and member.isreg():
                    if not 0 <= member.size <= limit:
                        raise ValueError(f'its {member.name[:200]!r} has {member.size} bytes')
                    yield member.name, tar.extractfile(member).read()
            while limited.read(_CHUNK_BYTES):  # up to the checksum at the end
                pass
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, RecursionError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


class _Limited:
    """The unpacked contents of a gzip file, up to a limit."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._left = gzip.GzipFile(fileobj=file), limit

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError('it unpacks to more than such a file can have')
        return data


def _check_end(file: BinaryIO, end: int, stop: int) -> None:
    """Checks that there are zeros where tarfile found no more members."""
    file.seek(end)
    block = file.read(min(_BLOCK, max(stop - end, 0)))
    if len(block) < _BLOCK:
        raise ValueError('it is truncated: its end marker is missing')
    if block.count(0) < _BLOCK:
        raise ValueError(f'its header at byte {end} is damaged')
    left = stop - end - _BLOCK
    if left > _MAX_END_BYTES or file.read(left).strip(b'\0'):
        raise ValueError(f'its header at byte {end} is zeros, but more follows')


class _Headers:
    """A file for tarfile that allows short reads only, enough for headers."""

    def __init__(self, file: BinaryIO, stop: int):
        self._file, self._stop = file, stop
        self.tell = file.tell

    def seek(self, place: int) -> int:
        if not 0 <= place <= self._stop:
            raise tarfile.ReadError('it is truncated')
        return self._file.seek(place)

    def read(self, count: int = -1) -> bytes:
        if not 0 <= count <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f'a header claims to have {count} bytes')
        return self._file.read(count)
