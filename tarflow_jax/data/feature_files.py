"""Reads a feature vector for each image: from a .csv by name, or from a .npy in order."""

import array
import csv
import hashlib
import logging
from collections.abc import Iterator, Sequence

import numpy as np

from tarflow_jax.data.splits import Originals, Split, Task

log = logging.getLogger('tarflow_jax')


def attach(found: Originals, path: str) -> Originals:
    """Adds the features in a file to the images of a source.

    Args:
        found: the source.
        path: for image files, a .csv with a header and one row per image. The first column is the
            path of the image in the source; the others are features. For arrays, a .npy [N, F] with
            one row per image of a single split, in order; its features are named '0', '1', ...

    Returns:
        The source; the identity of its splits now covers the features.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged or of the wrong kind, has a value that is not a finite float32, or
            lacks an image.
    """
    arrays = any(part.names is None for part in found.splits.values())
    kind, what = ('.npy', 'parquet, CIFAR, batch or IDX files') if arrays else (
        '.csv', 'image files'
    )
    if not path.endswith(kind):
        raise ValueError(f'--features is {path}, but {what} need a {kind} file; give one.')
    try:
        names, feature_of = _in_order(found, path) if arrays else _by_name(found, path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{path} does not exist; correct --features.') from error
    splits = {
        key: _with_features(part, feature_of[key]) for key, part in found.splits.items()
    }
    return found._replace(features=names, splits=splits)


def _with_features(part: Split, feature_NxF: np.ndarray) -> Split:
    def tasks(start: int, stop: int) -> Iterator[Task]:
        for task in part.tasks(start, stop):
            first, start = start, start + len(task.names)
            yield task._replace(features=feature_NxF[first:start])

    digest = hashlib.sha256(feature_NxF).hexdigest()
    return part._replace(identity=f'{part.identity} {digest}', tasks=tasks)


def _in_order(found: Originals, path: str) -> tuple[list[str], dict[str, np.ndarray]]:
    if len(found.splits) > 1:
        raise ValueError(
            f'{path} has the features of one split, but this source has '
            f'{" and ".join(found.splits)}; choose one with --split.'
        )
    (key, part), = found.splits.items()
    try:
        rows = np.load(path, mmap_mode='r', allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f'{path} is not a .npy file; write it again with numpy.save.') from error
    if not isinstance(rows, np.ndarray) or rows.dtype.kind not in 'fiu':
        raise ValueError(f'{path} is not an array of numbers; write float32 [{part.count}, F].')
    if rows.ndim != 2 or len(rows) != part.count or not rows.shape[1]:
        raise ValueError(
            f'{path} has the shape {list(rows.shape)}, but the split {key} has {part.count} '
            f'images; write one row for each image, [{part.count}, F].'
        )
    names = [str(k) for k in range(rows.shape[1])]
    return names, {key: _finite(path, rows, range(len(rows)), names)}


def _by_name(found: Originals, path: str) -> tuple[list[str], dict[str, np.ndarray]]:
    names, row_of, feature_NxF = _read_csv(path)
    feature_of, used = {}, 0
    for key, part in found.splits.items():
        missing = [name for name in part.names if name not in row_of]
        if missing:
            raise ValueError(
                f'{path} has no row for {missing[0]!r} ({len(missing)} of {part.count} images of '
                f'the split {key} have none); add a row for each, or remove these images.'
            )
        rows = np.array([row_of[name] for name in part.names], np.intp)
        feature_of[key] = feature_NxF[rows]
        used += len(rows)
    if used < len(row_of):
        known = {name for part in found.splits.values() for name in part.names}
        extra = next(name for name in row_of if name not in known)
        log.warning(
            '%s: ignored %d rows that belong to no image of the dataset, such as %r', path,
            len(row_of) - used, extra,
        )
    return names, feature_of


def _read_csv(path: str) -> tuple[list[str], dict[str, int], np.ndarray]:
    """Returns the feature names, the row of each image, and the features, float32 [N, F]."""
    row_of: dict[str, int] = {}
    values = array.array('f')  # a list would need many gigabytes for a million rows
    with open(path, newline='', encoding='utf-8-sig') as file:
        reader = csv.reader(file)
        try:
            _, *names = next(reader, ['image'])
            if not names:
                raise ValueError('its header names no feature after the first column')
            for name, *row in filter(None, reader):
                if name in row_of:
                    raise ValueError(f'{name!r} appears twice')
                if len(row) != len(names):
                    raise ValueError(f'{len(row)} numbers, but the header names {len(names)}')
                values.extend(map(float, row))
                row_of[name] = len(row_of)
        except (ValueError, csv.Error) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(
                f'{path}, line {reader.line_num}: {error}; write a header, then one row per image '
                'with its path and its numbers.'
            ) from error
    feature_NxF = np.frombuffer(values, np.float32).reshape(len(row_of), len(names))
    return names, row_of, _finite(path, feature_NxF, list(row_of), names)


def _finite(path: str, rows: np.ndarray, images: Sequence, names: list[str]) -> np.ndarray:
    """Converts the rows to float32 and checks that they are finite."""
    with np.errstate(over='ignore'):  # overflow is reported below
        feature_NxF = np.ascontiguousarray(rows, np.float32)
    wrong = np.argwhere(~np.isfinite(feature_NxF))
    if wrong.size:
        i, k = wrong[0]
        raise ValueError(
            f'{path} has {rows[i, k]} as the feature {names[k]!r} of the image {images[i]!r}, '
            'which is not a finite float32; correct it, or remove the image.'
        )
    return feature_NxF
