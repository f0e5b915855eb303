"""The ImageNet site's batches as .npz files, also within a zip, read from their start on.

Neither may be unpacked at random where it is deflated, and a batch has more than a gigabyte: its
images are read in order, as they are asked for, and nothing else is kept.
"""

import math
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from tarflow_jax.data import arrays, zip_files

_MAX_LABELS = 10**7
_MAX_SIDE = 1024


class NpzBatch:
    """Images of one .npz, still in the file, and their labels as they are there.

    Attributes:
        side: S of the square images [S,S,3].
        labels: int [N].
    """

    def __init__(self, path: str, member: zip_files.Member | None = None):
        """Reads the shapes and the labels.

        Args:
            path: the .npz, or the zip that holds it.
            member: the .npz in the zip.

        Raises:
            ValueError: it is damaged or holds something else; says what, not where.
        """
        self._path, self._member = path, member
        self._rows: tuple[Any, int] | None = None  # a stream, and the row that it stands at
        with open(path, 'rb') as file:
            found: dict[str, Any] = {}
            for name, stream in self._members(file):
                if name == 'labels.npy':
                    found[name] = _labels(stream)
                elif name == 'data.npy':
                    found[name] = _pixels(stream)
        if len(found) < 2:
            raise ValueError('it holds no arrays called data and labels')
        self.labels = found['labels.npy']
        count, width = self._shape = found['data.npy']
        self.side = math.isqrt(width // 3)
        if width != 3 * self.side**2 or not 0 < self.side <= _MAX_SIDE:
            raise ValueError(f'it holds rows of {width} numbers, which is no square colour image')
        if len(self.labels) != count or count == 0:
            raise ValueError(f'it holds {count} images and {len(self.labels)} labels')

    def images(self, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, S, S, 3]; fast where start is the stop of the call before, or later.

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
            raise ValueError(f'{self._path} {error}; fetch it again.') from error
        if len(data) < (stop - start) * width:
            raise ValueError(f'{self._path} is truncated; fetch it again.')
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
        raise ValueError('it holds an array in the order of Fortran')
    return shape, dtype


def _pixels(stream: zip_files.Stream) -> tuple[int, int]:
    """N and 3*S*S."""
    shape, dtype = _header(stream)
    if len(shape) == 4 and shape[1] == 3:  # some hold [N,3,S,S]
        shape = shape[0], math.prod(shape[1:])
    if dtype != np.uint8 or len(shape) != 2:
        raise ValueError(f'it holds data of {dtype} {list(shape)}, not uint8 [N, 3*S*S]')
    return shape


def _labels(stream: zip_files.Stream) -> np.ndarray:
    shape, dtype = _header(stream)
    count = math.prod(shape)
    if dtype.kind not in 'iu' or len(shape) != 1 or count > _MAX_LABELS:
        raise ValueError(f'it holds labels of {dtype} {list(shape)}')
    data = stream.read(count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise ValueError('its labels are truncated')
    return np.frombuffer(data, dtype)
