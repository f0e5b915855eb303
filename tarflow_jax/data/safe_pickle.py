"""Reads pickles of arrays, lists, dicts and numbers without executing arbitrary code.

A pickle is a program. Here, it may name only NumPy arrays, and it gets stand-ins for them, which
accept only the state of an array of plain numbers. Keys of dicts must be strings, bytes or whole
numbers, because hashing a deeply nested key would exhaust the C stack.
Source: the protocol of `numpy.ndarray.__reduce__`, and `pickletools`.
"""

import mmap
import pickle
from pathlib import Path
from typing import Any

import numpy as np

_LARGE = 2**20


def read_file(path: Path) -> Any:
    """Reads the pickle in a file; large strings and arrays are memory-mapped.

    Raises:
        Exception: of nearly any type, if it is damaged or names anything forbidden.
    """
    with open(path, 'rb') as file:
        return read(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read(content: mmap.mmap | bytes) -> Any:
    """Reads a pickle; NumPy arrays become `Array`.

    Raises:
        Exception: of nearly any type, if it is damaged or names anything forbidden.
    """
    return _Unpickler(_Mapped(content), encoding='latin1').load()


# The unpickler in C would allocate memory for any memo index in the file and would read the pixels
# into memory, so this is the one in Python.
class _Unpickler(pickle._Unpickler):
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module.replace('numpy._core.', 'numpy.core.'), name]
        except KeyError:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}'[:200]) from None

    def _decode_string(self, value: bytes | memoryview) -> Any:  # strings of Python 2
        return value if isinstance(value, memoryview) else value.decode('latin1')

    def _set_item(self) -> None:
        self._check_keys(self.stack[-2:])
        pickle._Unpickler.load_setitem(self)

    def _set_items(self) -> None:
        self._check_keys(self.stack)
        pickle._Unpickler.load_setitems(self)

    def _dict(self) -> None:
        self._check_keys(self.stack)
        pickle._Unpickler.load_dict(self)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError('it contains a set')

    @staticmethod
    def _check_keys(items: list) -> None:
        if not all(isinstance(key, str | bytes | int) for key in items[::2]):
            raise pickle.UnpicklingError('it contains a dict with keys other than strings')

    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.DICT[0]] = _dict
    for _opcode in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        dispatch[_opcode[0]] = _refuse


class _Mapped:
    """A file for an unpickler; long reads return views of the file without copying."""

    def __init__(self, content: mmap.mmap | bytes):
        self._content, self._view, self._at = content, memoryview(content), 0

    def read(self, count: int) -> bytes | memoryview:
        taken = self._view[self._at:self._at + count]
        if len(taken) < count:
            raise EOFError(f'it has {len(self._view)} bytes, fewer than it claims')
        self._at += count
        return taken if count >= _LARGE else bytes(taken)

    def readline(self) -> bytes:
        end = self._content.find(b'\n', self._at) + 1 or len(self._view)
        line = bytes(self._view[self._at:end])
        self._at = end
        return line


class _DType:
    """Stands in for numpy.dtype: accepts plain numbers, rejects objects."""

    __slots__ = ('dtype',)

    def __init__(self, text: Any):
        self.dtype = np.dtype(text if isinstance(text, str) else 'O')
        if self.dtype.kind not in 'biuf':
            raise pickle.UnpicklingError(f'it contains an array of {text!r}'[:200])

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder('>' if state[1] == '>' else '<')


class Array:
    """Stands in for numpy.ndarray."""

    __slots__ = ('_shape', '_dtype', '_fortran', '_raw')

    def __setstate__(self, state: Any) -> None:
        _, self._shape, dtype, self._fortran, raw = state
        self._dtype = dtype.dtype
        self._raw = raw.encode('latin1') if isinstance(raw, str) else raw

    def array(self) -> np.ndarray:
        flat = np.frombuffer(self._raw, self._dtype)
        return flat.reshape(self._shape, order='F' if self._fortran else 'C')


class _Callable:
    """A function that a pickle may call, but whose attributes it cannot set."""

    __slots__ = ('_call',)

    def __init__(self, call):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it changes the state of a function')


def _buffer_array(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
    made = Array()
    made.__setstate__((1, shape, dtype, order == 'F', raw))
    return made


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'it encodes as {encoding!r}'[:200])
    return text.encode('latin1')


_ALLOWED = {
    ('numpy', 'ndarray'): 'ndarray',
    ('numpy', 'dtype'): _Callable(lambda text, *_: _DType(text)),
    ('numpy.core.multiarray', '_reconstruct'): _Callable(lambda *_: Array()),
    ('numpy.core.numeric', '_frombuffer'): _Callable(_buffer_array),
    ('_codecs', 'encode'): _Callable(_encode_latin1),
}
