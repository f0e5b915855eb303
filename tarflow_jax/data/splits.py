"""The common form of all sources: splits of images, divided into tasks for worker processes."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarflow_jax.data import cropping
from tarflow_jax.data.image_files import Encoded, encode_array
from tarflow_jax.data.listing import File, printable

DEFAULT_SIZE = (64, 64)
IMAGES_PER_TASK = 64
SHARD_PIXEL_BYTES = 192 * 2**20  # 16384 images of 64x64x3, about 140 MB as PNG
_SPLITS = {
    'train': 'train', 'training': 'train', 'val': 'validation', 'valid': 'validation',
    'validation': 'validation', 'dev': 'validation', 'test': 'test', 'testing': 'test',
}
_SIZE_SUFFIX = r'(?:_(\d+)x\2)?'
_SPLIT_NAME = re.compile(
    rf'(?:ILSVRC2012_img_)?(train|training|test|val|valid|validation){_SIZE_SUFFIX}', re.IGNORECASE
)


class Wanted(NamedTuple):
    """The options of the command line for a source."""

    size: tuple[int, int] | None = None  # height and width; None is the source's own, or 64
    split: str | None = None  # the split of the source, or the one to take from it; None is all
    crop: str = 'torchvision'  # a rule of `cropping`
    labels: str | None = None  # a file with the labels of images that are not in class folders
    test_fraction: float | None = None  # the part to split off as test
    classes: list[str] | None = None  # classes of splits prepared before, which define the labels
    rotate: bool = False  # whether to apply the EXIF orientation
    background: tuple[int, int, int] | None = None  # the colour for transparent pixels
    channels: int | None = None  # channels of splits prepared before


class Group(NamedTuple):
    """The image files of one split."""

    files: list[File]
    classes: list[str] | None  # the class name of each file; None if there are no classes
    notes: tuple[tuple[str, str], ...] = ()  # as in Split


class Pictures(NamedTuple):
    """A source of image files."""

    groups: dict[str | None, Group]  # by split; None if the names give no split
    classes: list[str] | None
    size: tuple[int, int] | None = None  # height and width of all images, if known
    dataset: str | None = None  # name of the dataset; None is that of the folder or archive
    by_folder: bool = False  # whether to note classes without files


class Task(NamedTuple):
    """The images of one call in a worker process."""

    names: list[str]
    labels: list[int]
    function: Callable[..., list[Encoded]]
    arguments: tuple
    features: np.ndarray | None = None  # float32 [images, F]


class Split(NamedTuple):
    """One split of a source."""

    count: int
    identity: str  # changes if the names or sizes of the images change
    tasks: Callable[[int, int], Iterator[Task]]  # tasks for the images [start, stop)
    notes: list[tuple[str, str]]  # (name, note) about files other than images
    problems: int = 0  # how many of the notes, the last ones, are errors with --strict
    names: list[str] | None = None  # names of the image files; None for arrays


class Originals(NamedTuple):
    """A recognised source."""

    dataset: str
    size: tuple[int, int]  # height and width
    channels: int
    classes: list[str] | None  # names by label; None if there are no labels
    preprocessing: str
    splits: dict[str, Split]
    features: list[str] | None = None  # feature names; None if there are none
    crop: str | None = None  # the crop rule; None if images are not cropped
    encoded: bool = False  # whether images are files, which may have EXIF and transparency


def images_per_shard(size: tuple[int, int], channels: int) -> int:
    """Returns the number of images per shard, which have 192 MiB of pixels."""
    return max(1, SHARD_PIXEL_BYTES // (size[0] * size[1] * channels))


def chosen(found: dict[str, Any], split: str | None, source: Path) -> dict[str, Any]:
    """Keeps only the requested split; None keeps all.

    Raises:
        ValueError: there is no such split.
    """
    if split is None:
        return found
    if split not in found:
        raise ValueError(
            f'{source} has the split(s) {", ".join(found)}, but not {split!r}; choose one of '
            'them, or leave out --split.'
        )
    return {split: found[split]}


def split_of_folder(name: str) -> tuple[str, str | None] | None:
    """Returns the split of a folder name, and its size if it has one, as in train_64x64."""
    match = _SPLIT_NAME.fullmatch(name)
    return match and (_SPLITS[match[1].lower()], match[2])


def split_in_path(path: str) -> str | None:
    """Returns the split that a word of the file name, or else of a folder name, stands for.

    For example in data/train-00000-of-00005.parquet, shards/imagenet-val-0001.tar and
    test/0000.parquet.
    """
    for part in reversed(path.split('/')):
        for word in re.split(r'[^a-z]+', part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return None


def set_name(source: Path) -> str:
    """Returns the dataset's name: that of its folder or archive, or of a lone split's parent."""
    source = source.absolute()
    name = re.sub(r'(-\d{5}-of-\d{5})?\.(tar|zip|parquet)$', '', source.name)
    name = source.parent.name if split_of_folder(name) else name
    return printable(name)


def identity(lines: Iterable) -> str:
    """Returns a digest of JSON-serializable lines."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line).encode() + b'\n')
    return digest.hexdigest()


def array_split(parts: list, identity: str, size: tuple[int, int],
                crop: str = 'torchvision') -> Split:
    """Makes a split by concatenating parts (name, labels, images(start, stop))."""

    def tasks(start: int, stop: int) -> Iterator[Task]:
        before = 0
        for name, label_N, images in parts:
            last = min(stop - before, len(label_N))
            for first in range(max(start - before, 0), last, IMAGES_PER_TASK):
                rows = range(first, min(first + IMAGES_PER_TASK, last))
                yield Task(
                    [f'{name}[{row}]' for row in rows], label_N[rows.start:rows.stop].tolist(),
                    encode_array, (images(rows.start, rows.stop), size, crop),
                )
            before += len(label_N)

    return Split(sum(len(label_N) for _, label_N, _ in parts), identity, tasks, [])


def arrays_in_memory(dataset: str, splits: dict[str, tuple[str, np.ndarray, np.ndarray]],
                     classes: list[str], wanted: Wanted) -> Originals:
    """Makes Originals from arrays in memory, all of one shape.

    Args:
        dataset: the name of the dataset.
        splits: for each split (file name, uint8 [N,H,W,C] with 1 or 3 channels, int32 labels [N]).
        classes: the class names.
        wanted: the options; only size and crop are used.
    """
    (_, first, _), *_ = splits.values()
    height, width, channels = first.shape[1:]
    size = wanted.size or (height, width)
    crop = None if size == (height, width) else wanted.crop
    made = {}
    for split, (name, images, labels) in splits.items():
        digest = hashlib.sha256(np.ascontiguousarray(images))
        digest.update(np.ascontiguousarray(labels))
        take = _Slices(images)
        made[split] = array_split([(name, labels, take)], digest.hexdigest(), size, wanted.crop)
    return Originals(
        dataset, size, channels, classes, cropping.describe(size, crop) if crop else 'none', made,
        crop=crop,
    )


class _Slices(NamedTuple):
    image_NxHxWxC: np.ndarray

    def __call__(self, start: int, stop: int) -> np.ndarray:
        return self.image_NxHxWxC[start:stop]
