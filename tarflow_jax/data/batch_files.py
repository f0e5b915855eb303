"""Reads the downsampled ImageNet of the ImageNet site: train_data_batch_1 and so on.

Each file is a pickle of a dict, or a .npz of the same arrays (unpacked or in its zip): `data`,
uint8 [N, 3*S*S], one channel after another; `labels`, numbers from 1 to 1000; often `mean`.
"""

import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarflow_jax.data import npz_files, safe_pickle, sizes, zip_files
from tarflow_jax.data.splits import Originals, Wanted, array_split, chosen, identity

BOX_RESIZED = 'imagenet_resized/{0}x{0} (box-resized, ImageNet site)'
NUM_CLASSES = 1000
TRAIN_NAMES = tuple(f'train_data_batch_{k}' for k in range(1, 11))
VALIDATION_NAME = 'val_data'
CLASS_NAMES_FILE = 'map_clsloc.txt'
_ZIP_NAME = re.compile(r'(imagenet\d+_(?:train|val))(?:_part[12])?(?:_npz)?\.zip', re.IGNORECASE)


class Batch(NamedTuple):
    """The images of one file, read on demand, and their labels, counted from 0."""

    pixel_Nx3xSxS: np.ndarray
    label_N: np.ndarray

    def images(self, start: int, stop: int) -> np.ndarray:
        """Reads the images [start, stop) into memory: uint8 [stop - start, S, S, 3]."""
        return np.ascontiguousarray(self.pixel_Nx3xSxS[start:stop].transpose(0, 2, 3, 1))

    @property
    def side(self) -> int:
        """S."""
        return self.pixel_Nx3xSxS.shape[-1]


class Place(NamedTuple):
    """The location of one batch."""

    name: str  # without .npz
    path: Path  # the pickle, the .npz, or the zip that contains it
    size: int
    member: zip_files.Member | None = None  # the .npz in the zip


def recognise(source: Path, wanted: Wanted) -> Originals | None:
    """Recognises the batches in a folder or zip; returns None if there are none.

    Raises:
        FileNotFoundError: some of the ten training files are missing.
        ValueError: a file is damaged, or the files disagree with each other or with --size.
    """
    found = find(source)
    if not found:
        return None
    made, sides = {}, {}
    for split, places in chosen(found, wanted.split, source).items():
        batches = [(place, _open(place)) for place in places]
        sides |= {place.path: batch.side for place, batch in batches}
        own = min(sides.values())
        made[split] = array_split(
            [(place.name, batch.label_N, batch.images) for place, batch in batches],
            identity((place.path.name, place.size) for place in places), sizes.pair(own),
        )
    odd = next((path for path in sides if sides[path] != own), None)
    if odd:
        raise ValueError(
            f'{odd} has images of size {sides[odd]}, other files of {own}; keep only one of the '
            'datasets in the folder.'
        )
    if wanted.size not in (None, (own, own)):
        asked = sizes.text(wanted.size)
        raise ValueError(
            f'--size is {asked}, but {source} has images of size {own}, resized by the ImageNet '
            f'site; leave out --size, or download the files of size {asked}.'
        )
    folder = source if source.is_dir() else source.parent
    return Originals(
        BOX_RESIZED.format(own), sizes.pair(own), 3, class_names(folder),
        'none: the pixels are those of the files, resized by the ImageNet site with a box filter',
        made,
    )


def find(source: Path) -> dict[str, list[Place]]:
    """Finds the batches of each split in a folder or a zip; returns {} if there are none.

    Either of `Imagenet64_train_part1_npz.zip` and `..._part2_npz.zip` stands for both.

    Raises:
        FileNotFoundError: some of the ten training files are there, but not all.
        ValueError: a zip is damaged, or contains pickles.
    """
    if source.is_dir():
        there = _in_folder(source)
    elif match := _ZIP_NAME.fullmatch(source.name):
        parts = [path for path in sorted(source.parent.iterdir())
                 if _ZIP_NAME.fullmatch(path.name) and path.name.startswith(match[1])]
        there = _in_zips(parts)
    else:
        return {}
    found = {}
    missing = [name for name in TRAIN_NAMES if name not in there]
    if len(missing) < len(TRAIN_NAMES):
        if missing:
            raise FileNotFoundError(
                f'{source} lacks {", ".join(missing)} of the ten train_data_batch files; put both '
                'parts of the training set into one folder.'
            )
        found['train'] = [there[name] for name in TRAIN_NAMES]
    if VALIDATION_NAME in there:
        found['validation'] = [there[VALIDATION_NAME]]
    return found


def _in_folder(folder: Path) -> dict[str, Place]:
    names = set(os.listdir(folder))
    there = _in_zips([folder / name for name in sorted(names) if _ZIP_NAME.fullmatch(name)])
    for name in (*TRAIN_NAMES, VALIDATION_NAME):
        for file in (name, f'{name}.npz'):
            if file in names and (folder / file).is_file():
                there[name] = Place(name, folder / file, (folder / file).stat().st_size)
                break
    return there


def _in_zips(paths: list[Path]) -> dict[str, Place]:
    there = {}
    for path in paths:
        with open(path, 'rb') as file:
            try:
                members = list(zip_files.members(file))
            except ValueError as error:
                raise ValueError(
                    f'{path} is damaged or not a zip ({error}); download it again.'
                ) from error
        for member in members:
            name = os.path.basename(member.name)
            if name in (*TRAIN_NAMES, VALIDATION_NAME):
                raise ValueError(
                    f'{path} contains the pickle {member.name}; unpack the zip and pass the folder.'
                )
            name = name.removesuffix('.npz')
            if name in (*TRAIN_NAMES, VALIDATION_NAME):
                there[name] = Place(name, path, member.size, member)
    return there


def _open(place: Place) -> 'Batch | _Npz':
    if place.member is None and place.path.suffix != '.npz':
        return read_batch(place.path)
    try:
        batch = npz_files.NpzBatch(str(place.path), place.member)
    except Exception as error:  # NumPy raises nearly anything for a damaged header
        inside = f' ({place.member.name})' if place.member else ''
        raise ValueError(
            f'{place.path}{inside} is damaged or not a file of the ImageNet site: {error}; '
            'download it again.'
        ) from error
    return _Npz(batch.side, _labels(batch.labels, place.path), batch.images)


class _Npz(NamedTuple):
    side: int
    label_N: np.ndarray
    images: Any


def class_names(folder: Path) -> list[str]:
    """Reads the WordNet ids from map_clsloc.txt (lines such as `n02119789 1 kit_fox`).

    Returns:
        The names in the order of the labels; '1' to '1000' if there is no such file.

    Raises:
        ValueError: the file does not name each of the classes 1 to 1000 once.
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
            f'{path} does not name each of the classes 1 to {NUM_CLASSES} once; download it again, '
            'or remove it to prepare without names.'
        )
    return [names[k] for k in range(1, NUM_CLASSES + 1)]


def read_batch(path: Path) -> Batch:
    """Opens one file; pixels are read on demand.

    Raises:
        ValueError: the file is damaged, has other contents, or has unequal numbers of images and
            labels.
    """
    try:
        content = safe_pickle.read_file(path)
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(
            f'{path} is damaged or not a file of the ImageNet site ({error}); download it '
            'again.'
        ) from error
    if not isinstance(content, dict) or not {'data', 'labels'} <= content.keys():
        raise ValueError(f'{path} has no dict with data and labels; download it again.')
    data, labels = content['data'], content['labels']
    pixels = data.array() if isinstance(data, safe_pickle.Array) else np.zeros(0)
    label_N = _labels(labels, path)
    if pixels.dtype != np.uint8 or pixels.ndim != 2:
        raise ValueError(f'{path} has data other than uint8 [N, 3*S*S]; download it again.')
    count, width = pixels.shape
    size = math.isqrt(width // 3)
    if width != 3 * size * size or size == 0:
        raise ValueError(
            f'{path} has rows of {width} numbers, which is not a square colour image (12288 is '
            '64x64x3); download it again.'
        )
    if len(label_N) != count or count == 0:
        raise ValueError(
            f'{path} has {count} images but {len(label_N)} labels; download it again.'
        )
    return Batch(pixels.reshape(count, 3, size, size), label_N)


def _labels(labels: Any, path: Path) -> np.ndarray:
    values = labels.array() if isinstance(labels, safe_pickle.Array) else labels
    whole = (isinstance(values, np.ndarray) and values.dtype.kind in 'iu' and values.ndim == 1) or (
        isinstance(values, list) and all(type(label) is int for label in values)
    )
    if not whole:
        raise ValueError(f'{path} has labels that are not whole numbers; download it again.')
    wrong = [label for label in values if not 1 <= label <= NUM_CLASSES]
    if wrong:
        raise ValueError(
            f'{path} has the label {wrong[0]}, outside 1 to {NUM_CLASSES}; download it again.'
        )
    return np.asarray(values, np.int32) - 1
