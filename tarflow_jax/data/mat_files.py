"""Reads MATLAB's .mat files of version 5, as needed for CIFAR and the ImageNet development kit.

Supports numbers, text, cells and structs. Checks every length against the data before using it.
Source: "MAT-File Format", MathWorks, the chapter on version 5.
"""

import math
import struct
import zlib
from typing import Any

import numpy as np

_NUMBERS = {
    1: 'i1', 2: 'u1', 3: 'i2', 4: 'u2', 5: 'i4', 6: 'u4', 7: 'f4', 9: 'f8', 12: 'i8', 13: 'u8',
}
_TEXTS = {1: 'latin1', 2: 'latin1', 4: 'utf-16-le', 16: 'utf-8', 17: 'utf-16-le'}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC = range(6, 16)
_MAX_BYTES = 2**28
_MAX_DEPTH = 4


def read(data: bytes) -> dict[str, Any]:
    """Reads the variables of a file: arrays, str for rows of text, lists of cells or of dicts.

    Raises:
        ValueError: the file is damaged, of another version, or has unsupported contents.
    """
    if len(data) < 128 or data[124:128] != b'\x00\x01IM':
        raise ValueError('it is not a .mat file of version 5')
    found, view = {}, memoryview(data)[128:]
    while view:
        kind, content, view = _element(view)
        if kind == _COMPRESSED:
            inflate = zlib.decompressobj()
            try:
                unpacked = inflate.decompress(content, _MAX_BYTES)
            except zlib.error as error:
                raise ValueError(f'it is damaged: {error}') from error
            if not inflate.eof:
                raise ValueError('it is truncated, or larger than 256 MiB')
            kind, content, _ = _element(memoryview(unpacked))
        if kind == _MATRIX:
            name, value = _matrix(content, 0)
            found[name] = value
    return found


def _element(view: memoryview) -> tuple[int, memoryview, memoryview]:
    """Returns the type and content of the next element, and the rest of the data."""
    if len(view) < 8:
        raise ValueError('it is truncated')
    kind, size = struct.unpack_from('<II', view)
    if kind >> 16:  # a short element, with its content in the size field
        if kind >> 16 > 4:
            raise ValueError('it is damaged')
        return kind & 0xFFFF, view[4:4 + (kind >> 16)], view[8:]
    if size > len(view) - 8:
        raise ValueError('it is truncated')
    end = 8 + size if kind == _COMPRESSED else 8 + -(-size // 8) * 8
    return kind, view[8:8 + size], view[end:]


def _numbers(view: memoryview) -> tuple[np.ndarray, memoryview]:
    kind, content, rest = _element(view)
    if kind not in _NUMBERS:
        raise ValueError('it has something else where numbers belong')
    dtype = np.dtype(_NUMBERS[kind]).newbyteorder('<')
    if len(content) % dtype.itemsize:
        raise ValueError('it is damaged')
    return np.frombuffer(content, dtype), rest


def _matrix(view: memoryview, depth: int) -> tuple[str, Any]:
    """Returns the name and value of a variable, a cell or a field."""
    if depth > _MAX_DEPTH:
        raise ValueError(f'it is nested more than {_MAX_DEPTH} deep')
    if not view:
        return '', None
    flags, view = _numbers(view)
    dims, view = _numbers(view)
    name, view = _numbers(view)
    if not len(flags) or dims.dtype.kind != 'i' or (dims < 0).any():
        raise ValueError('it is damaged')
    shape = [int(length) for length in dims]
    kind, count = int(flags[0]) & 0xFF, math.prod(shape)
    return name.tobytes().decode('latin1'), _value(kind, shape, count, view, depth)


def _value(kind: int, shape: list[int], count: int, view: memoryview, depth: int) -> Any:
    if kind in _NUMERIC:
        numbers, _ = _numbers(view)
        if len(numbers) != count:
            raise ValueError(f'it has {len(numbers)} numbers instead of {count}')
        return numbers.reshape(shape, order='F')
    if kind == _CHAR:
        kind, content, _ = _element(view)
        if kind not in _TEXTS:
            raise ValueError('it has something else where text belongs')
        return content.tobytes().decode(_TEXTS[kind], 'replace')
    if kind == _CELL:
        return list(_items(view, count, depth))
    if kind == _STRUCT:
        length, view = _numbers(view)
        names, view = _numbers(view)
        if len(length) != 1 or not 0 < length[0] or len(names) % length[0] or not len(names):
            raise ValueError('it is damaged')
        text, step = names.tobytes().decode('latin1'), int(length[0])
        keys = [text[k:k + step].rstrip('\0') for k in range(0, len(text), step)]
        values = _items(view, count * len(keys), depth)
        return [{key: next(values) for key in keys} for _ in range(count)]
    raise ValueError(f'it has a variable of the class {kind}, which is not supported')


def _items(view: memoryview, count: int, depth: int):
    if count * 8 > len(view):
        raise ValueError('it is truncated')
    for _ in range(count):
        kind, content, view = _element(view)
        if kind != _MATRIX:
            raise ValueError('it is damaged')
        yield _matrix(content, depth + 1)[1]
