"""What people have of a set of images, recognised by looking, as splits of images to encode."""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tarflow_jax.data import batch_files, sizes, sources
from tarflow_jax.data.image_files import Encoded, encode_array, encode_files
from tarflow_jax.data.listing import File, list_source

DEFAULT_SIZE = (64, 64)
BOX_RESIZED = 'imagenet_resized/{0}x{0} (box-resized, ImageNet site)'
DOWNSAMPLED = 'downsampled_imagenet/{0}x{0}'
IMAGES_PER_TASK = 64
SHARD_PIXEL_BYTES = 192 * 2**20  # 16384 images of 64x64x3, some 140 MB as PNG
_SPLIT_NAME = re.compile(
    r'(?:ILSVRC2012_img_)?(train|training|val|valid|validation|test)(?:_(\d+)x\2)?', re.IGNORECASE
)
_SPLITS = {'training': 'train', 'val': 'validation', 'valid': 'validation'}
_KINDS = (
    "the ImageNet site's train_data_batch_1 to 10 and val_data, train_64x64 and valid_64x64 of the "
    'older ImageNet64, folders or a .tar of CLASS/IMAGE, also below train/, val/ and test/, or '
    'IDX files (train-images-idx3-ubyte[.gz])'
)


class Task(NamedTuple):
    """Images for one call in another process."""

    names: list[str]
    labels: list[int]
    function: Callable[..., list[Encoded]]
    arguments: tuple
    features: np.ndarray | None = None  # float32 [images, F]


class Split(NamedTuple):
    """One split as it lies in the source."""

    count: int
    identity: str  # changes with the images, as far as their names and sizes tell
    tasks: Callable[[int, int], Iterator[Task]]  # of images [start, stop)
    notes: list[tuple[str, str]]  # (name, what to know of it), other than images
    problems: int = 0  # how many of the notes --strict does not accept
    names: list[str] | None = None  # of the image files; None for arrays


class Originals(NamedTuple):
    """A recognised source."""

    dataset: str
    size: tuple[int, int]  # height and width
    channels: int
    classes: list[str] | None  # names by label; None if there are no labels
    preprocessing: str
    splits: dict[str, Split]
    features: list[str] | None = None  # their names; None if there are none


def images_per_shard(size: tuple[int, int], channels: int) -> int:
    """How many images to put in a shard: as many as have 192 MiB of pixels."""
    return max(1, SHARD_PIXEL_BYTES // (size[0] * size[1] * channels))


def recognise(source: str, *, size: tuple[int, int] | None, split: str | None,
              name: str | None, classes: list[str] | None) -> Originals:
    """Finds out what a source is.

    Args:
        source: a folder or a tar.
        size: (height, width) wanted; None is the source's own, or 64 for photographs.
        split: the one split that the source is or that is wanted of it; None is all.
        name: what to call the set; None is the name that the source goes by.
        classes: names that labels must be of; None takes those of the source.

    Raises:
        FileNotFoundError: the source or a part of it is not there.
        ValueError: it is none of the kinds known, or damaged.
    """
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f'{source} is not there; correct the path.')
    if path.is_dir() and (batches := batch_files.find(path)):
        found = _batches(path, _wanted(batches, split, source), size)
    elif path.is_dir() and (splits := _idx_splits(path)):
        found = _idx(path, _wanted(splits, split, source), size)
    else:
        found = _pictures(path, size, split, classes)
    if classes is not None and found.classes is not None:
        unknown = [k for k in found.classes if k not in classes]
        if unknown:
            raise ValueError(
                f'{source} has the class {unknown[0]!r}, which is not among the {len(classes)} '
                'classes prepared before; prepare all splits anew in another folder.'
            )
        found = found._replace(classes=classes)
    return found._replace(dataset=name or found.dataset)


def _wanted(found: dict[str, Any], split: str | None, source) -> dict[str, Any]:
    if split is None:
        return found
    if split not in found:
        raise ValueError(
            f'{source} holds the split(s) {", ".join(found)} and not {split!r}; choose one of '
            'them, or leave --split away.'
        )
    return {split: found[split]}


def _hash(lines) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(json.dumps(line).encode() + b'\n')
    return digest.hexdigest()


# --- arrays: the ImageNet site's batch files, and IDX files ---


def _batches(folder: Path, splits: dict[str, list[Path]],
             size: tuple[int, int] | None) -> Originals:
    made, sides = {}, {}
    for name, paths in splits.items():
        batches = [(path.name, batch_files.read_batch(path)) for path in paths]
        sides |= {name: batch.pixel_Nx3xSxS.shape[-1] for name, batch in batches}
        identity = _hash((path.name, path.stat().st_size) for path in paths)
        parts = [(name, batch.label_N, batch.images) for name, batch in batches]
        made[name] = _array_split(parts, identity, sizes.pair(min(sides.values())))
    own = min(sides.values())
    odd = next((name for name in sides if sides[name] != own), None)
    if odd:
        raise ValueError(
            f'{folder / odd} holds images of size {sides[odd]}, other files of {own}; keep only '
            'one of the sets in the folder.'
        )
    if size not in (None, (own, own)):
        raise ValueError(
            f'--size is {sizes.text(size)}, but {folder} holds images of size {own}, resized by '
            f'the ImageNet site; leave --size away, or fetch the files of size {sizes.text(size)}.'
        )
    return Originals(
        BOX_RESIZED.format(own), sizes.pair(own), 3, batch_files.class_names(folder),
        'none: the pixels are those of the files, resized by the ImageNet site with a box filter',
        made,
    )


def _idx_splits(folder: Path) -> dict[str, str]:
    found = {}
    for split, prefix in sources.IDX_PREFIXES.items():
        if any(folder.glob(f'{prefix}-images[-.]idx3-ubyte*')):
            found[split] = prefix
    return found


def _idx(folder: Path, splits: dict[str, str], size: tuple[int, int] | None) -> Originals:
    opened = {split: sources.idx_folder(folder, split) for split in splits}
    shapes = {source.image_NxHxWxC.shape[1:] for source in opened.values()}
    if len(shapes) > 1:
        raise ValueError(f'{folder} holds images of the shapes {sorted(shapes)}; prepare one set.')
    (height, width, channels), = shapes
    if channels not in (1, 3):
        raise ValueError(
            f'{folder} holds images [{height},{width},{channels}]; they must have 1 or 3 channels.'
        )
    wanted = size or (height, width)
    preprocessing = 'none' if (height, width) == wanted else _resized(wanted)
    made = {}
    for split, source in opened.items():
        images, labels = source.image_NxHxWxC, source.label_N
        digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        take = functools.partial(_slice, images)
        made[split] = _array_split([(f'{splits[split]}-images', labels, take)], digest, wanted)
    classes = 1 + max(int(source.label_N.max()) for source in opened.values())
    return Originals(
        _folder_name(folder), wanted, channels, [str(k) for k in range(classes)], preprocessing,
        made,
    )


def _slice(image_NxHxWxC: np.ndarray, start: int, stop: int) -> np.ndarray:
    return image_NxHxWxC[start:stop]


def _array_split(parts: list, identity: str, size: tuple[int, int]) -> Split:
    """A split of parts (name, labels, images(start, stop)), one after another."""

    def tasks(start: int, stop: int) -> Iterator[Task]:
        before = 0
        for name, label_N, images in parts:
            last = min(stop - before, len(label_N))
            for first in range(max(start - before, 0), last, IMAGES_PER_TASK):
                rows = range(first, min(first + IMAGES_PER_TASK, last))
                yield Task(
                    [f'{name}[{row}]' for row in rows], label_N[rows.start:rows.stop].tolist(),
                    encode_array, (images(rows.start, rows.stop), size),
                )
            before += len(label_N)

    return Split(sum(len(label_N) for _, label_N, _ in parts), identity, tasks, [])


# --- image files, in folders and tars ---


def _pictures(source: Path, size: tuple[int, int] | None, split: str | None,
              classes: list[str] | None) -> Originals:
    listing = list_source(source)
    placed = [(file.name.split('/'), file) for file in listing.files]
    placed += [(folder.split('/'), None) for folder in sorted(listing.folders)]
    if not listing.files:
        raise ValueError(f'{source} holds no files; what can be prepared is {_KINDS}.')
    placed = _unwrapped(placed)
    tops = {parts[0] for parts, file in placed if len(parts) > 1}
    names = sorted(top for top in tops if _SPLIT_NAME.fullmatch(top))
    outside = []
    if names:
        groups: dict[str, tuple[str, list]] = {}
        for name in names:
            inside = [(parts[1:], file) for parts, file in placed if parts[0] == name and parts[1:]]
            if _split_name(name) in groups:
                raise ValueError(
                    f'{source} holds {groups[_split_name(name)][0]} and {name}, two names of one '
                    'split; take one of them away.'
                )
            groups[_split_name(name)] = (name, _unwrapped(inside, splits=True))
        outside = [
            (file.name, 'lies outside the splits and was left out')
            for parts, file in placed if file and parts[0] not in names
        ]
        groups = _wanted(groups, split, source)
    else:
        own = source.name.removesuffix('.tar')
        split = split or (_split_name(own) if _SPLIT_NAME.fullmatch(own) else None)
        if split is None:
            raise ValueError(
                f'{source} has no folders train, val or test and its own name is no split; say '
                f'which split it is, such as --split=train. What can be prepared is {_KINDS}.'
            )
        groups = {split: (own, placed)}
    own_sizes = {_SPLIT_NAME.fullmatch(name)[2] for name, _ in groups.values()
                 if _SPLIT_NAME.fullmatch(name)} - {None}
    if len(own_sizes) > 1:
        raise ValueError(f'{source} holds the sizes {sorted(own_sizes)}; prepare one of them.')
    own_size = sizes.parse(own_sizes.pop()) if own_sizes else None
    if own_size and size not in (None, own_size):
        raise ValueError(
            f'--size is {sizes.text(size)}, but {source} holds images of size '
            f'{sizes.text(own_size)}, resized before; leave --size away.'
        )
    wanted = own_size or size or DEFAULT_SIZE
    found = _class_folders(source, {k: placed for k, (_, placed) in groups.items()})
    made = {
        name: _file_split(placed, classes or found, wanted, bool(own_size), outside)
        for name, (_, placed) in groups.items()
    }
    return Originals(
        DOWNSAMPLED.format(own_size[0]) if own_size else _folder_name(source),
        wanted, 3, found,
        'none: the pixels are those of the files' if own_size else _resized(wanted), made,
    )


def _resized(size: tuple[int, int]) -> str:
    height, width = size
    rule = (
        f'short side resized to {height} pixels' if height == width else
        f'resized, aspect kept, until both sides cover {height}x{width} (height x width) pixels'
    )
    return f'{rule}, bilinear and antialiased (Pillow), then the middle {height}x{width} cut out'


def _split_name(name: str) -> str:
    plain = _SPLIT_NAME.fullmatch(name)[1].lower()
    return _SPLITS.get(plain, plain)


def _folder_name(source: Path) -> str:
    source = source.absolute()
    name = source.name.removesuffix('.tar')
    return source.parent.name if _SPLIT_NAME.fullmatch(name) else name


def _unwrapped(placed: list, splits: bool = False) -> list:
    """Without the folders that hold all the rest, such as afhq/ around afhq/train/cat/1.jpg.

    A folder around nothing but files is a class, and kept, unless it is named like a split and
    `splits` lets these go too.
    """
    while True:
        files = [parts for parts, file in placed if file]
        tops = {parts[0] for parts, _ in placed}
        if len(tops) != 1 or not files:
            return placed
        is_split = bool(_SPLIT_NAME.fullmatch(next(iter(tops))))
        depth = 2 if is_split else 3
        if (is_split and not splits) or min(map(len, files)) < depth:
            return placed
        placed = [(parts[1:], file) for parts, file in placed if parts[1:]]


def _class_folders(source: Path, groups: dict[str, list]) -> list[str] | None:
    """Sorted names of the class folders of all splits; None if there are none."""
    found, without = set(), None
    for split, placed in groups.items():
        folders = {parts[0] for parts, file in placed if file is None or len(parts) > 1}
        found |= folders
        without = without if folders else split
    if found and without:
        raise ValueError(
            f'the split {without} of {source} has no class folders and others have; sort its '
            'images into the folders of their classes, or prepare it in a folder of its own.'
        )
    return sorted(found) or None


def _file_split(placed: list, classes: list[str] | None, size: tuple[int, int], exact: bool,
                outside: list) -> Split:
    notes = list(outside)
    files: list[File] = []
    labels: list[int] = []
    label_of = {name: label for label, name in enumerate(classes or [])}
    for parts, file in placed:
        if file is None:
            continue
        if classes is None:
            files.append(file)
            labels.append(-1)
        elif len(parts) > 1:
            files.append(file)
            labels.append(label_of.get(parts[0], -1))  # what is unknown is refused by `recognise`
        else:
            notes.append((file.name, 'lies in no class folder and was left out'))
    empty = sorted(label_of.keys() - {classes[label] for label in labels}) if classes else []
    notes += [(name, 'is a class without a file in this split; it keeps its label')
              for name in empty]

    def tasks(start: int, stop: int) -> Iterator[Task]:
        for first in range(start, stop, IMAGES_PER_TASK):
            some = slice(first, min(first + IMAGES_PER_TASK, stop))
            yield Task(
                [file.name for file in files[some]], labels[some], encode_files,
                (files[some], size, exact),
            )

    lines = ((file.name, file.offset, file.size, label) for file, label in zip(files, labels))
    names = [file.name for file in files]
    return Split(len(files), _hash(lines), tasks, notes, problems=len(empty), names=names)
