"""Reads the classes of ImageNet's validation images, which are all in one folder.

The labels are in the development kit (ILSVRC2012_devkit_t12) or in Kaggle's LOC_val_solution.csv.
"""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from tarflow_jax.data import mat_files, tar_files

TRUTH = 'ILSVRC2012_validation_ground_truth.txt'
SOLUTION = 'LOC_val_solution.csv'
_MAPPING = 'LOC_synset_mapping.txt'
_META = 'meta.mat'
_KIT = 'ILSVRC2012_devkit_t12'
_NAME = re.compile(r'ILSVRC2012_val_(\d{8})')
_CLASSES = 1000
_MAX_BYTES = 2**26


class Labels(NamedTuple):
    """The class of each image by the stem of its file name, and all classes in order."""

    path: Path
    class_of: dict[str, str]
    classes: list[str]


def is_flat(names: Iterable[str]) -> bool:
    """Returns whether all names are those of ImageNet's validation images."""
    return all(_NAME.match(name) for name in names)


def find(folders: Iterable[Path], given: str | None) -> Labels | None:
    """Reads the given file of labels, or one in the folders; returns None if there is none.

    Raises:
        FileNotFoundError: the given file, or a file that it needs, does not exist.
        ValueError: a file is damaged or of an unknown kind.
    """
    if given is not None:
        path = Path(given)
        if not path.is_file():
            raise FileNotFoundError(f'{path} does not exist; correct --labels.')
        return read(path)
    kits = (f'{_KIT}/data/{TRUTH}', f'data/{TRUTH}', TRUTH, f'{_KIT}.tar.gz')
    for folder in folders:
        for name in (SOLUTION, *kits):
            if (folder / name).is_file():
                return read(folder / name)
    return None


def read(path: Path) -> Labels:
    """Reads LOC_val_solution.csv, the kit's ground truth with its meta.mat, or the kit's tar.gz.

    Raises:
        FileNotFoundError: meta.mat is missing.
        ValueError: a file is damaged or of another kind.
    """
    try:
        if path.suffix == '.csv':
            mapping = path.with_name(_MAPPING)
            rows = _small(path), _small(mapping) if mapping.is_file() else None
            return Labels(path, *_solution(*rows))
        if path.suffix == '.txt':
            meta = path.with_name(_META)
            if not meta.is_file():
                raise FileNotFoundError(
                    f'{meta} does not exist, but it has the names of the numbers in {path}; unpack '
                    'the whole development kit.'
                )
            return Labels(path, *_truth(_small(path), _small(meta)))
        if path.name.endswith('.tar.gz'):
            found = {
                name.rpartition('/')[2]: content
                for name, content in tar_files.gzipped(path, _MAX_BYTES, lambda name: name.endswith(
                    (f'data/{TRUTH}', f'data/{_META}')
                ))
            }
            if len(found) < 2:
                raise ValueError(f'it lacks {TRUTH} or {_META}')
            return Labels(path, *_truth(found[TRUTH], found[_META]))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f'{path} is damaged or not a file of ImageNet: {error}; download it again.'
                         ) from error
    raise ValueError(
        f'{path} is not a known file of labels; pass {SOLUTION}, {TRUTH} or {_KIT}.tar.gz.'
    )


def _small(path: Path) -> bytes:
    with open(path, 'rb') as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f'{path.name} has more than {_MAX_BYTES} bytes')
    return data


def _solution(solution: bytes, mapping: bytes | None) -> tuple[dict[str, str], list[str]]:
    rows = csv.reader(io.StringIO(solution.decode('utf-8-sig')))
    class_of = {}
    try:
        next(rows, None)  # the header
        for row in filter(None, rows):
            image, boxes = row  # such as n01978287 85 1 499 272, and perhaps more boxes
            class_of[image] = boxes.split()[0]
    except (csv.Error, ValueError, IndexError):
        raise ValueError(f'line {rows.line_num} is not IMAGE,CLASS ...') from None
    classes = set(class_of.values())
    if mapping is not None:
        lines = mapping.decode('utf-8').splitlines()  # such as n01440764 tench, Tinca tinca
        classes |= {line.split()[0] for line in lines if line.strip()}
    return class_of, sorted(classes)


def _truth(truth: bytes, meta: bytes) -> tuple[dict[str, str], list[str]]:
    synsets = mat_files.read(meta).get('synsets')
    try:
        name_of = {int(row['ILSVRC2012_ID'].item()): row['WNID'] for row in synsets}
    except (TypeError, KeyError, AttributeError, ValueError):
        name_of = {}
    names = [name_of.get(k) for k in range(1, _CLASSES + 1)]
    if not all(isinstance(name, str) for name in names) or len(set(names)) < _CLASSES:
        raise ValueError(f'its {_META} does not name the classes 1 to {_CLASSES}')
    numbers = truth.decode('ascii').split()
    wrong = next((n for n in numbers if not n.isdecimal() or not 1 <= int(n) <= _CLASSES), None)
    if wrong is not None or not numbers:
        raise ValueError(f'{wrong!r} is not a number from 1 to {_CLASSES}')
    class_of = {
        f'ILSVRC2012_val_{k:08d}': name_of[int(number)] for k, number in enumerate(numbers, 1)
    }
    return class_of, sorted(names)
