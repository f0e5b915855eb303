"""Recognises parquet files of images in the form of Hugging Face.

The column `image` or `img` has a struct of bytes and path, bytes, or nested lists of numbers [H,W]
or [H,W,C]. The column `label`, `labels` or `fine_label` has numbers or names. The schema's
`huggingface` metadata names numbered classes. The name of a file or of its folder gives the split,
as in train-00000-of-00005.parquet.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tarflow_jax.data import cropping, parquet_files
from tarflow_jax.data.image_files import (
    SUFFIXES,
    Encoded,
    Form,
    all_grey_contents,
    encode_array,
    encode_contents,
    size_of_content,
)
from tarflow_jax.data.parquet_files import Part
from tarflow_jax.data.splits import (
    DEFAULT_SIZE,
    Originals,
    Split,
    Task,
    Wanted,
    chosen,
    identity,
    set_name,
    split_in_path,
)

_NUMBERED = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.parquet')
_IMAGES = tuple(f'.{suffix}' for suffix in SUFFIXES)
_LOOKED_AT = 16  # images to read to find the size


def recognise(source: Path, wanted: Wanted) -> Originals | None:
    """Recognises a .parquet file, or those in a folder; returns None if there are none.

    Raises:
        FileNotFoundError: some of the files of a split are missing.
        ValueError: a file is damaged, has no images, or does not match the others.
    """
    files = _find(source)
    if not files:
        return None
    parts = {
        split: [parquet_files.open_part(path) for path in paths]
        for split, paths in _by_split(source, files, wanted).items()
    }
    first = next(iter(parts.values()))[0]
    for part in (part for group in parts.values() for part in group):
        if part[2:] != first[2:]:
            raise ValueError(
                f'{part.path} has other columns or other class names than {first.path}; prepare '
                'one dataset at a time.'
            )
    labels = {
        split: [parquet_files.labels(part) for part in group] if first.label else None
        for split, group in parts.items()
    }
    labels, notes = _without_unlabelled(labels, wanted)
    classes = _class_names(first, labels)
    size, channels, exact = _size(first, wanted)
    if not first.nested and wanted.channels != 3:
        every = (
            content for group in parts.values() for part in group
            for contents in parquet_files.images(part, 0, sum(part.rows)) for content in contents
        )
        channels = 1 if all_grey_contents(every) else 3
    form = Form(size, exact, wanted.crop, wanted.rotate, wanted.background, channels)
    crop = None if exact else wanted.crop
    label_of = {name: k for k, name in enumerate(wanted.classes or classes or ())}
    splits = {}
    for split, found in labels.items():
        numbers = [
            np.full(sum(part.rows), -1) if found is None or classes is None else
            _numbers(part, values, classes, label_of)
            for part, values in zip(parts[split], found or parts[split])
        ]
        splits[split] = _split(parts[split], numbers, form, notes)
        notes = []
    if wanted.classes and set(classes or ()) <= label_of.keys():
        classes = classes and wanted.classes  # the labels now refer to these
    return Originals(
        set_name(source), size, channels, classes,
        cropping.describe(size, crop) if crop else 'none: the pixels are those of the files',
        splits, crop=crop, encoded=not first.nested,
    )


def _find(source: Path) -> list[Path]:
    """Finds the .parquet files; none if there are image files, whose metadata they then are."""
    if source.is_file():
        return [source] if source.suffix == '.parquet' else []
    found = []
    for folder, folders, names in os.walk(source):
        if any(name.lower().endswith(_IMAGES) for name in names):
            return []
        folders[:] = [name for name in folders if not name.startswith('.')]
        found += [Path(folder) / name for name in names
                  if name.endswith('.parquet') and not name.startswith('.')]
    return sorted(found)


def _by_split(source: Path, files: list[Path], wanted: Wanted) -> dict[str, list[Path]]:
    groups: dict[str | None, list[Path]] = {}
    for path in files:
        inside = path.name if source.is_file() else str(path.relative_to(source))
        groups.setdefault(split_in_path(inside), []).append(path)
    if None in groups:
        split = wanted.split or split_in_path(source.name)
        if len(groups) > 1 or split is None:
            raise ValueError(
                f'the name of {groups[None][0]} has no split, unlike train-00000-of-00001.parquet; '
                + (
                    'rename it, or prepare it alone.' if len(groups) > 1 else
                    'name the split, such as --split=train.'
                )
            )
        groups = {split: groups[None]}
    found = chosen(groups, wanted.split, source)
    for paths in found.values():
        if not source.is_file():
            _check_all_there(paths)
    return found


def _check_all_there(paths: list[Path]) -> None:
    """Checks that all five of NAME-00000-of-00005.parquet, and so on, exist."""
    held: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := _NUMBERED.fullmatch(path.name):
            held.setdefault((path.parent, match[1], int(match[3])), set()).add(int(match[2]))
    for (folder, name, count), numbers in held.items():
        missing = next((k for k in range(count) if k not in numbers), None)
        if missing is not None:
            raise FileNotFoundError(
                f'{folder} lacks {name}-{missing:05d}-of-{count:05d}.parquet '
                f'({count - len(numbers)} of {count} files are missing); download it.'
            )


def _without_unlabelled(labels: dict[str, list | None], wanted: Wanted):
    """Leaves out splits without labels (all -1 or missing, as in test sets) if others have them."""
    def is_empty(split: str) -> bool:
        return labels[split] is not None and not any(
            (values > -1).any() if isinstance(values, np.ndarray) else any(values)
            for values in labels[split]
        )

    empty = {split for split in labels if is_empty(split)}
    if wanted.split is None and 0 < len(empty) < len(labels):
        notes = [
            (split, 'has no labels, but the other splits have, so it was left out; prepare it with '
             f'--split={split} in its own --out') for split in sorted(empty)
        ]
        return {split: found for split, found in labels.items() if split not in empty}, notes
    return {split: None if split in empty else found for split, found in labels.items()}, []


def _class_names(first: Part, labels: dict[str, list | None]) -> list[str] | None:
    parts = [values for found in labels.values() for values in found or ()]
    if not parts:
        return None
    if len({type(values) for values in parts}) > 1:
        raise ValueError(
            f'{first.path.parent} has files with numbers as labels and others with names; write '
            'all labels in one way.'
        )
    if isinstance(parts[0], list):
        return sorted({name for values in parts for name in values if name})
    highest = max(int(values.max(initial=-1)) for values in parts)
    if first.names is None:
        return [str(k) for k in range(highest + 1)]
    if highest >= len(first.names):
        raise ValueError(
            f'{first.path.parent} has the label {highest}, but its schema names '
            f'{len(first.names)} classes; correct one of them.'
        )
    return first.names


def _numbers(part: Part, values: list | np.ndarray, classes: list[str],
             label_of: dict[str, int]) -> np.ndarray:
    """Converts labels to the numbers of the prepared dataset."""
    if isinstance(values, list):
        values = np.array([-1 if not name else label_of.get(name, -1) for name in values], np.int32)
    else:
        values = np.array([label_of.get(name, -1) for name in classes] + [-1], np.int32)[values]
    if (values < 0).any() and set(classes) <= label_of.keys():
        row = int(np.argmax(values < 0))
        raise ValueError(
            f'{part.path} has no label in row {row}, but other rows have; give every row a label.'
        )
    return values


def _size(first: Part, wanted: Wanted) -> tuple[tuple[int, int], int, bool]:
    """Returns the size and channels of the prepared images, and whether to reject others."""
    rows = []
    for images in parquet_files.images(first, 0, min(_LOOKED_AT, sum(first.rows))):
        rows += images
    if first.nested:
        shape = next((image.shape for image in rows if image.ndim == 3), (0, 0, 0))
        own, channels = shape[:2], shape[2]
        if channels not in (1, 3):
            raise ValueError(f'{first.path} has no image of 1 or 3 channels in its first rows.')
    else:
        found = {size_of_content(content, wanted.rotate) for content in rows} - {None}
        own, channels = (found.pop() if len(found) == 1 else None), 3
        if own and own[0] != own[1]:
            own = None  # photographs of one camera, to be cropped
    # With --size, image files of other sizes are resized, not rejected.
    exact = own is not None and wanted.size in ((None, own) if first.nested else (None,))
    return (own if exact else wanted.size or own or DEFAULT_SIZE), channels, exact


def _split(parts: list[Part], labels: list[np.ndarray], form: Form,
           notes: list[tuple[str, str]]) -> Split:
    """Makes one split, whose images are read in order."""

    def tasks(start: int, stop: int) -> Iterator[Task]:
        before = 0
        for part, label_N in zip(parts, labels):
            row = max(start - before, 0)
            last = min(stop - before, len(label_N))
            if row < last:
                for images in parquet_files.images(part, row, last):
                    names = [f'{part.path.name}[{k}]' for k in range(row, row + len(images))]
                    some = label_N[row:row + len(images)].tolist()
                    if part.nested:
                        yield Task(names, some, encode_nested, (images, form))
                    else:
                        yield Task(names, some, encode_contents, (images, form))
                    row += len(images)
            before += len(label_N)

    lines = [(part.path.name, part.path.stat().st_size) for part in parts]
    return Split(sum(map(len, labels)), identity(lines), tasks, notes)


def encode_nested(images: list[np.ndarray], form: Form) -> list[Encoded]:
    """Converts arrays to PNG files; rejects other channels and, if `exact`, other sizes."""
    size, channels = form.size, form.channels
    encoded = []
    for image in images:
        if image.ndim != 3 or image.shape[2] != channels or not image.size:
            encoded.append(Encoded(None, f'is not an image of {channels} channel(s) from 0 to 255'))
        elif form.exact and image.shape[:2] != size:
            height, width = image.shape[:2]
            encoded.append(Encoded(None, f'is {width}x{height}, not {size[1]}x{size[0]}'))
        else:
            encoded += encode_array([image], size, form.crop)
    return encoded
