"""Recognises image files in folders, tars and zips, in any of the common layouts."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from tarflow_jax.data import class_folders, cropping, edm_files, webdataset
from tarflow_jax.data.image_files import Form, all_grey, encode_files
from tarflow_jax.data.listing import Listing, list_source
from tarflow_jax.data.splits import (
    DEFAULT_SIZE,
    IMAGES_PER_TASK,
    Group,
    Originals,
    Pictures,
    Split,
    Task,
    Wanted,
    chosen,
    identity,
    set_name,
    split_of_folder,
)

KINDS = (
    "the ImageNet site's train_data_batch_1 to 10 and val_data (or their .npz and its zips), "
    'train_64x64 and valid_64x64 of the older ImageNet64, folders, .tar or .zip of CLASS/IMAGE, '
    'also below train/, val/ and test/, a .zip of StyleGAN or EDM, WebDataset shards, parquet '
    'files, CIFAR-10 and CIFAR-100, or IDX files (train-images-idx3-ubyte[.gz])'
)
_HASHED = 2**32


def recognise(source: Path, wanted: Wanted) -> Originals:
    """Recognises the image files of a source, in any layout.

    Raises:
        FileNotFoundError: labels are missing.
        ValueError: there are no files, or they match none of the layouts.
    """
    listing = list_source(class_folders.images_folder(source))
    if not listing.files:
        raise ValueError(f'{source} has no files; pass one of these: {KINDS}.')
    found = edm_files.find(listing, wanted.rotate) or webdataset.find(listing)
    if found and wanted.labels:
        raise ValueError(
            f'--labels is {wanted.labels}, but {source} already has labels; leave out --labels'
            '.'
        )
    found = found or class_folders.find(source, listing, wanted)
    groups = _in_splits(source, found, wanted)
    exact = found.size is not None and wanted.size in (None, found.size)
    size = found.size if exact else wanted.size or DEFAULT_SIZE
    classes = wanted.classes or found.classes
    # If one split is in colour, all splits are.
    grey = wanted.channels != 3 and all_grey(f for group in groups.values() for f in group.files)
    form = Form(size, exact, wanted.crop, wanted.rotate, wanted.background, 1 if grey else 3)
    splits = {}
    for name, group in groups.items():
        splits[name] = _split(group, classes if found.classes else None, form, found.by_folder,
                              None if splits else listing)
    return Originals(
        found.dataset or set_name(source), size, form.channels, found.classes,
        'none: the pixels are those of the files' if exact else
        cropping.describe(size, wanted.crop), splits, crop=None if exact else wanted.crop,
        encoded=True,
    )


def _in_splits(source: Path, found: Pictures, wanted: Wanted) -> dict[str, Group]:
    """Returns the groups by split; cuts one in two if --test_fraction is set."""
    groups = found.groups
    if None in groups and len(groups) > 1:
        raise ValueError(
            f'{source} has files of the split(s) {", ".join(filter(None, groups))}, and also '
            f'{groups[None].files[0].name}, whose name has no split; prepare one split at a time, '
            'each with --split.'
        )
    if wanted.test_fraction is not None:
        if set(groups) not in ({None}, {'train'}):
            raise ValueError(
                f'--test_fraction is {wanted.test_fraction}, but {source} has the split(s) '
                f'{", ".join(groups)}; leave out --test_fraction.'
            )
        (_, group), = groups.items()
        return chosen(_cut(source, group, wanted.test_fraction), wanted.split, source)
    if None not in groups:
        return chosen(groups, wanted.split, source)
    named = split_of_folder(source.name.removesuffix('.tar').removesuffix('.zip'))
    split = wanted.split or (named and named[0])
    if split is None:
        raise ValueError(
            f'{source} has no folders train, val or test, and its own name is not a split; name '
            'the split, such as --split=train, or split off a test set with '
            f'--test_fraction=0.1. Supported sources: {KINDS}.'
        )
    return {split: groups[None]}


def _cut(source: Path, group: Group, fraction: float) -> dict[str, Group]:
    """Splits off the test files; only the name and class of each file decide about it."""
    tests = []
    for k, file in enumerate(group.files):
        name = f'{group.classes[k] if group.classes else ""}/{file.name.rpartition("/")[2]}'
        digest = hashlib.sha256(name.encode()).digest()
        tests.append(int.from_bytes(digest[:4], 'big') < fraction * _HASHED)
    if all(tests) or not any(tests):
        raise ValueError(
            f'--test_fraction={fraction} leaves {"no" if all(tests) else "all"} images of {source} '
            f'for training; choose another for its {len(tests)} images.'
        )
    return {
        split: Group(
            [file for file, test in zip(group.files, tests) if test == is_test],
            group.classes and [name for name, test in zip(group.classes, tests) if test == is_test],
            () if is_test else group.notes,
        )
        for split, is_test in (('train', False), ('test', True))
    }


def _split(group: Group, classes: list[str] | None, form: Form, by_folder: bool,
           listing: Listing | None) -> Split:
    """Makes a split; the first one gets the notes about files that the listing left out."""
    label_of = {name: label for label, name in enumerate(classes or [])}
    files = group.files
    # `originals.recognise` rejects unknown classes.
    labels = [label_of.get(name, -1) for name in group.classes or ()] or [-1] * len(files)
    empty = sorted(label_of.keys() - set(group.classes or ())) if by_folder else []
    notes = list(listing.notes.items() if listing else ()) + list(group.notes)
    problems = [(name, 'is a class without files in this split; it keeps its label')
                for name in empty]
    problems += listing.problems.items() if listing else ()

    def tasks(start: int, stop: int) -> Iterator[Task]:
        for first in range(start, stop, IMAGES_PER_TASK):
            some = slice(first, min(first + IMAGES_PER_TASK, stop))
            yield Task(
                [file.name for file in files[some]], labels[some], encode_files,
                (files[some], form),
            )

    lines = ((file.name, file.offset, file.size, label) for file, label in zip(files, labels))
    return Split(
        len(files), identity(lines), tasks, notes + problems, len(problems),
        [file.name for file in files],
    )
