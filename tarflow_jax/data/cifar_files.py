"""Reads CIFAR-10 and CIFAR-100 from the archives of their site: Python, binary or MATLAB.

CIFAR-100 uses the 100 fine labels. Source: https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarflow_jax.data import mat_files, safe_pickle, tar_files
from tarflow_jax.data.splits import Originals, Wanted, arrays_in_memory, chosen

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_MAX_FILE_BYTES = 2**28  # the largest real file has 156 MB
_MAX_BYTES = 2**30  # limit for an unpacked archive; a real one has 0.2 GB


class _Layout(NamedTuple):
    """One of the six archives."""

    folder: str
    classes: int
    train: list[str]
    test: list[str]
    names: str  # the file with the names of the classes
    read: Callable[[bytes, int], tuple[Any, Any]]  # images and labels of a file
    read_names: Callable[[bytes], Any]


def recognise(source: Path, wanted: Wanted) -> Originals | None:
    """Recognises a CIFAR archive, its unpacked folder, or the parent of that; else returns None.

    Raises:
        FileNotFoundError: files of a split are missing.
        ValueError: a file is damaged.
    """
    found = _in_folder(source) if source.is_dir() else _in_archive(source)
    if found is None:
        return None
    layout, contents = found
    splits = {}
    for split, names in (('train', layout.train), ('test', layout.test)):
        missing = [name for name in names if name not in contents]
        if not missing:
            splits[split] = names
        elif len(missing) < len(names):
            raise FileNotFoundError(f'{source} lacks {", ".join(missing)}; unpack it again.')
    splits = chosen(splits, wanted.split, source)
    if not splits or layout.names not in contents:
        raise FileNotFoundError(
            f'{source} lacks {layout.names if splits else " and ".join(layout.train)} of CIFAR-'
            f'{layout.classes}; download it again.'
        )
    arrays = {
        split: (f'{layout.folder}/{split}', *_together(source, layout, contents, names))
        for split, names in splits.items()
    }
    classes = _of(source, layout.names, lambda: _class_names(
        layout.read_names(contents[layout.names]()), layout.classes
    ))
    return arrays_in_memory(f'cifar{layout.classes}', arrays, classes, wanted)


def _together(source: Path, layout: _Layout, contents: dict[str, Callable[[], bytes]],
              names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    parts = [
        _of(source, name, lambda name=name: _checked(
            *layout.read(contents[name](), layout.classes), layout.classes
        ))
        for name in names
    ]
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts))
    images = pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels


def _of(source: Path, name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        place = source / name if source.is_dir() else f'{source} ({name})'
        raise ValueError(
            f'{place} is damaged or not a CIFAR file '
            f'({str(error)[:200] or type(error).__name__}); download it again.'
        ) from error


def _checked(pixels: Any, labels: Any, classes: int) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or (
        pixels.shape[1] != _PIXELS or not len(pixels)
    ):
        raise ValueError(f'it has data other than uint8 [N, {_PIXELS}]')
    label_N = np.asarray(labels)
    if label_N.dtype.kind not in 'iu' or label_N.size != len(pixels):
        raise ValueError(f'it has {len(pixels)} images but another number of labels')
    label_N = label_N.reshape(-1)
    if label_N.min() < 0 or label_N.max() >= classes:
        raise ValueError(f'it has a label outside 0 to {classes - 1}')
    return pixels, label_N.astype(np.int32)


def _class_names(names: Any, classes: int) -> list[str]:
    names = [name.strip() if isinstance(name, str) else None for name in names]
    if len(names) != classes or None in names or len(set(names)) != classes:
        raise ValueError(f'it does not have the names of {classes} classes')
    return names


# --- the files of each archive ---


def _pickled(data: bytes) -> dict[str, Any]:
    found = safe_pickle.read(data)
    if not isinstance(found, dict):
        raise ValueError('it is not a dict')
    return {
        (key.decode('latin1') if isinstance(key, bytes) else key): value
        for key, value in found.items()
    }


def _read_pickle(data: bytes, classes: int) -> tuple[Any, Any]:
    found = _pickled(data)
    pixels = found['data']
    if isinstance(pixels, safe_pickle.Array):
        pixels = pixels.array()
    return pixels, found['labels' if classes == 10 else 'fine_labels']


def _pickled_names(data: bytes) -> list[str]:
    found = _pickled(data)
    names = found.get('label_names') or found['fine_label_names']
    return [name.decode('latin1') if isinstance(name, bytes) else name for name in names]


def _read_binary(data: bytes, classes: int) -> tuple[Any, Any]:
    head = 1 if classes == 10 else 2  # in CIFAR-100 the coarse label comes first
    if not data or len(data) % (head + _PIXELS):
        raise ValueError(f'it has {len(data)} bytes, not a multiple of {head + _PIXELS}')
    rows = np.frombuffer(data, np.uint8).reshape(-1, head + _PIXELS)
    return rows[:, head:], rows[:, head - 1]


def _text_names(data: bytes) -> list[str]:
    return [line for line in data.decode('utf-8').splitlines() if line.strip()]


def _read_mat(data: bytes, classes: int) -> tuple[Any, Any]:
    found = mat_files.read(data)
    return found['data'], found['labels' if classes == 10 else 'fine_labels']


def _mat_names(data: bytes) -> list[str]:
    found = mat_files.read(data)
    return found['label_names' if 'label_names' in found else 'fine_label_names']


def _batches(suffix: str) -> list[str]:
    return [f'data_batch_{k}{suffix}' for k in range(1, 6)]


_LAYOUTS = (
    _Layout('cifar-10-batches-py', 10, _batches(''), ['test_batch'], 'batches.meta',
            _read_pickle, _pickled_names),
    _Layout('cifar-10-batches-bin', 10, _batches('.bin'), ['test_batch.bin'], 'batches.meta.txt',
            _read_binary, _text_names),
    _Layout('cifar-10-batches-mat', 10, _batches('.mat'), ['test_batch.mat'], 'batches.meta.mat',
            _read_mat, _mat_names),
    _Layout('cifar-100-python', 100, ['train'], ['test'], 'meta', _read_pickle, _pickled_names),
    _Layout('cifar-100-binary', 100, ['train.bin'], ['test.bin'], 'fine_label_names.txt',
            _read_binary, _text_names),
    _Layout('cifar-100-matlab', 100, ['train.mat'], ['test.mat'], 'meta.mat',
            _read_mat, _mat_names),
)


def _in_folder(folder: Path) -> tuple[_Layout, dict[str, Callable[[], bytes]]] | None:
    for layout in _LAYOUTS:
        for place in (folder, folder / layout.folder):
            names = [*layout.train, *layout.test, layout.names]
            there = [name for name in names if (place / name).is_file()]
            if layout.names in there and len(there) > 1:
                return layout, {
                    name: lambda path=place / name: _read_file(path) for name in there
                }
    return None


def _read_file(path: Path) -> bytes:
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f'it has {path.stat().st_size} bytes, more than any CIFAR file')
    return path.read_bytes()


def _in_archive(path: Path) -> tuple[_Layout, dict[str, Callable[[], bytes]]] | None:
    """Reads the files of an archive whose members are in one of the known folders."""
    found: list[_Layout] = []
    contents: dict[str, Callable[[], bytes]] = {}

    def is_wanted(member: str) -> bool:
        folder, _, name = member.removeprefix('./').partition('/')
        if not found:
            found.extend(layout for layout in _LAYOUTS if layout.folder == folder)
            if not found and folder not in ('', '.'):
                raise _Other
        return bool(found) and name in (*found[0].train, *found[0].test, found[0].names)

    try:
        for member, content in tar_files.gzipped(path, _MAX_BYTES, is_wanted):
            contents[member.rpartition('/')[2]] = lambda content=content: content
    except _Other:
        return None
    except ValueError as error:
        if not found:
            return None
        raise ValueError(f'{path} is truncated or damaged ({error}); download it again.') from error
    return (found[0], contents) if found else None


class _Other(Exception):
    """The archive is not one of CIFAR's."""
