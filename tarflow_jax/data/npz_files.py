"""Streams the ImageNet site's .npz batches, also from within a zip.

A batch has more than a gigabyte, and a compressed one allows no random access. So images are read
in order, on demand, and nothing else is kept in memory.
"""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from tarflow_jax.data import arrays, zip_files

_MAX_LABELS = 10**7
_MAX_SIDE = 1024


class NpzBatch:
    """The images of one .npz, read on demand, and their labels, as stored in the file.

    Attributes:
        side: S of the square images [S,S,3].
        labels: int [N].
    """

    def __init__(self, path: str, member: zip_files.Member | None = None):
        """Reads the shapes and the labels.

        Args:
            path: the .npz, or the zip that contains it.
            member: the .npz in the zip.

        Raises:
            ValueError: it is damaged or has other contents; the message gives no path.
        """
        self._path, self._member = path, member
        self._rows: tuple[Any, int] | None = None  # a stream and the index of its next row
        with open(path, 'rb') as file:
            found: dict[str, Any] = {}
            for name, stream in self._members(file):
                if name == 'labels.npy':
                    found[name] = _labels(stream)
                elif name == 'data.npy':
                    found[name] = _pixels(stream)
        if len(found) < 2:
            raise ValueError('it has no arrays called data and labels')
        self.labels = found['labels.npy']
        count, width = self._shape = found['data.npy']
        self.side = math.isqrt(width // 3)
        if width != 3 * self.side**2 or not 0 < self.side <= _MAX_SIDE:
            raise ValueError(f'it has rows of {width} numbers, which is not a square colour image')
        if len(self.labels) != count or count == 0:
            raise ValueError(f'it has {count} images but {len(self.labels)} labels')

    def images(self, start: int, stop: int) -> np.ndarray:
        """Reads images [start, stop): uint8 [stop - start, S, S, 3].

        It is fast if start is at or after the stop of the previous call.

        Raises:
            ValueError: the file is damaged or has changed.
        """
        width = self._shape[1]
        try:
            if self._rows is None or self._rows[1] > start:
                self._rows = self._open(), 0
            stream, row = self._rows
            stream.skip((start - row) * width)
            data = stream.read((stop - start) * width)
        except ValueError as error:
            raise ValueError(f'{self._path} {error}; download it again.') from error
        if len(data) < (stop - start) * width:
            raise ValueError(f'{self._path} is truncated; download it again.')
        self._rows = stream, stop
        pixel_Nx3xSxS = np.frombuffer(data, np.uint8).reshape(-1, 3, self.side, self.side)
        return np.ascontiguousarray(pixel_Nx3xSxS.transpose(0, 2, 3, 1))

    def _open(self) -> zip_files.Stream:
        for name, stream in self._members(open(self._path, 'rb')):
            if name == 'data.npy' and _pixels(stream) == self._shape:
                return stream
        raise ValueError('has changed')

    def _members(self, file: BinaryIO) -> Iterator[tuple[str, zip_files.Stream]]:
        if self._member is None:
            return zip_files.stream_members(file)
        member = self._member
        try:
            stream = zip_files.open_member(file, member.offset, member.packed)
        except EOFError as error:
            raise ValueError('ends before its member') from error
        return zip_files.stream_members(stream)


def _header(stream: zip_files.Stream) -> tuple[tuple[int, ...], np.dtype]:
    shape, order, dtype = arrays.header(stream)
    if order == 'F' and len(shape) > 1:
        raise ValueError('it has an array in Fortran order')
    return shape, dtype


def _pixels(stream: zip_files.Stream) -> tuple[int, int]:
    """Returns N and 3*S*S."""
    shape, dtype = _header(stream)
    if len(shape) == 4 and shape[1] == 3:  # some files have [N,3,S,S]
        shape = shape[0], math.prod(shape[1:])
    if dtype != np.uint8 or len(shape) != 2:
        raise ValueError(f'its data is {dtype} {list(shape)}, not uint8 [N, 3*S*S]')
    return shape


def _labels(stream: zip_files.Stream) -> np.ndarray:
    shape, dtype = _header(stream)
    count = math.prod(shape)
    if dtype.kind not in 'iu' or len(shape) != 1 or count > _MAX_LABELS:
        raise ValueError(f'its labels are {dtype} {list(shape)}')
    data = stream.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise ValueError('its labels are truncated')
    return np.frombuffer(data, dtype)
