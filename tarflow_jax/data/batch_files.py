"""The downsampled ImageNet as the ImageNet site serves it: train_data_batch_1 and so on.

Each is a pickle of a dict: `data`, uint8 [N, 3*S*S], the channels one after another; `labels`, a
list of 1 to 1000; often `mean`. A pickle is a program, so this one may name nothing but NumPy's
arrays, and even these are not NumPy's here but stand-ins that take only what an array of plain
numbers needs. Source: the protocol of `numpy.ndarray.__reduce__`, and `pickletools`.
"""

import math
import mmap
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUM_CLASSES = 1000
TRAIN_NAMES = tuple(f'train_data_batch_{k}' for k in range(1, 11))
VALIDATION_NAME = 'val_data'
CLASS_NAMES_FILE = 'map_clsloc.txt'
_LARGE = 2**20


class Batch(NamedTuple):
    """Images of one file, still in the file, and their labels, from 0."""

    pixel_Nx3xSxS: np.ndarray
    label_N: np.ndarray

    def images(self, start: int, stop: int) -> np.ndarray:
        """uint8 [stop - start, S, S, 3], in memory."""
        return np.ascontiguousarray(self.pixel_Nx3xSxS[start:stop].transpose(0, 2, 3, 1))


def find(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in the folder; empty if it holds none.

    Raises:
        FileNotFoundError: some of the ten training files are there, but not all.
    """
    found = {}
    there = [name for name in TRAIN_NAMES if (folder / name).is_file()]
    if there:
        missing = [name for name in TRAIN_NAMES if name not in there]
        if missing:
            raise FileNotFoundError(
                f'{folder} lacks {", ".join(missing)} of the ten train_data_batch files; unpack '
                'both parts of the training set into it.'
            )
        found['train'] = [folder / name for name in there]
    if (folder / VALIDATION_NAME).is_file():
        found['validation'] = [folder / VALIDATION_NAME]
    return found


def class_names(folder: Path) -> list[str]:
    """The WordNet ids from map_clsloc.txt (lines of `n02119789 1 kit_fox`); '1' to '1000' without.

    Raises:
        ValueError: the file does not name the classes 1 to 1000, each once.
    """
    path = folder / CLASS_NAMES_FILE
    if not path.is_file():
        return [str(k) for k in range(1, NUM_CLASSES + 1)]
    try:
        rows = [line.split() for line in path.read_text(encoding='utf-8').splitlines() if line]
        names = {int(row[1]): row[0] for row in rows}
    except (UnicodeDecodeError, ValueError, IndexError):
        names = {}
    if sorted(names) != list(range(1, NUM_CLASSES + 1)) or len(set(names.values())) < NUM_CLASSES:
        raise ValueError(
            f'{path} does not name the classes 1 to {NUM_CLASSES}, each once; fetch it again, or '
            'take it away to go without names.'
        )
    return [names[k] for k in range(1, NUM_CLASSES + 1)]


def read_batch(path: Path) -> Batch:
    """Opens one file; the pixels stay in it until they are asked for.

    Raises:
        ValueError: the file is truncated or damaged, holds something else, or its images and
            labels do not fit each other.
    """
    try:
        content = _unpickle(path)
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f'{path} is truncated, damaged or no file of the ImageNet site ({error}); fetch it '
            'again.'
        ) from error
    if not isinstance(content, dict) or not {'data', 'labels'} <= content.keys():
        raise ValueError(f'{path} holds no dict with data and labels; fetch it again.')
    data, labels = content['data'], content['labels']
    pixels = data.array() if isinstance(data, _Array) else np.zeros(0)
    label_N = _labels(labels, path)
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f'{path} holds data other than uint8 [N, 3*S*S]; fetch it again.')
    count, width = pixels.shape
    size = math.isqrt(width // 3)
    if width != 3 * size * size or size == 0:
        raise ValueError(
            f'{path} holds rows of {width} numbers, which is no square colour image (12288 is '
            '64x64x3); fetch it again.'
        )
    if len(label_N) != count or count == 0:
        raise ValueError(
            f'{path} holds {count} images and {len(label_N)} labels; fetch it again.'
        )
    return Batch(pixels.reshape(count, 3, size, size), label_N)


def _labels(labels: Any, path: Path) -> np.ndarray:
    values = labels.array() if isinstance(labels, _Array) else labels
    whole = (isinstance(values, np.ndarray) and values.dtype.kind in 'iu' and values.ndim == 1) or (
        isinstance(values, list) and all(type(label) is int for label in values)
    )
    if not whole:
        raise ValueError(f'{path} holds labels that are no list of whole numbers; fetch it again.')
    wrong = [label for label in values if not 1 <= label <= NUM_CLASSES]
    if wrong:
        raise ValueError(
            f'{path} holds the label {wrong[0]}, not of 1 to {NUM_CLASSES}; fetch it again.'
        )
    return np.asarray(values, np.int32) - 1


def _unpickle(path: Path) -> Any:
    with open(path, 'rb') as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Unpickler(_Mapped(content), encoding='latin1').load()


# The unpickler in Python, because the one in C takes room for any index a file names in its memo,
# and would read the pixels into memory.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module.replace('numpy._core.', 'numpy.core.'), name]
        except KeyError:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}'[:200]) from None


class _Mapped:
    """What an unpickler needs of a file; long reads give views of the file, which cost nothing."""

    def __init__(self, content: mmap.mmap):
        self._content, self._view, self._at = content, memoryview(content), 0

    def read(self, count: int) -> bytes | memoryview:
        taken = self._view[self._at:self._at + count]
        if len(taken) < count:
            raise EOFError(f'{len(self._view)} bytes, and more were promised')
        self._at += count
        return taken if count >= _LARGE else bytes(taken)

    def readline(self) -> bytes:
        self._content.seek(self._at)
        line = self._content.readline()
        self._at += len(line)
        return line


class _DType:
    """In place of numpy.dtype: takes plain numbers, refuses objects."""

    __slots__ = ('dtype',)

    def __init__(self, text: Any):
        self.dtype = np.dtype(text if isinstance(text, str) else 'O')
        if self.dtype.kind not in 'biuf':
            raise pickle.UnpicklingError(f'it holds an array of {text!r}'[:200])

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder('>' if state[1] == '>' else '<')


class _Array:
    """In place of numpy.ndarray."""

    __slots__ = ('_shape', '_dtype', '_fortran', '_raw')

    def __setstate__(self, state: Any) -> None:
        _, self._shape, dtype, self._fortran, raw = state
        self._dtype = dtype.dtype
        self._raw = raw.encode('latin1') if isinstance(raw, str) else raw

    def array(self) -> np.ndarray:
        flat = np.frombuffer(self._raw, self._dtype)
        return flat.reshape(self._shape, order='F' if self._fortran else 'C')


class _Callable:
    """A function that a pickle may call and, unlike a function, cannot set attributes of."""

    __slots__ = ('_call',)

    def __init__(self, call):
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError('it changes what it calls')


def _buffer_array(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.__setstate__((1, shape, dtype, order == 'F', raw))
    return made


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'it encodes as {encoding!r}'[:200])
    return text.encode('latin1')


_ALLOWED = {
    ('numpy', 'ndarray'): 'ndarray',
    ('numpy', 'dtype'): _Callable(lambda text, *_: _DType(text)),
    ('numpy.core.multiarray', '_reconstruct'): _Callable(lambda *_: _Array()),
    ('numpy.core.numeric', '_frombuffer'): _Callable(_buffer_array),
    ('_codecs', 'encode'): _Callable(_encode_latin1),
}
