"""Reads WebDataset shards: tars in which KEY.jpg and KEY.cls or KEY.json form one sample.

Source: the description of the format in the WebDataset repository.
"""

import itertools
import json
import os
from typing import NamedTuple

from tarflow_jax.data import listing as listings
from tarflow_jax.data.image_files import SUFFIXES
from tarflow_jax.data.listing import File, Listing
from tarflow_jax.data.splits import Group, Pictures, split_in_path

_LABELS = ('cls', 'json')
_KEYS = ('label', 'cls', 'class', 'class_id', 'class_name')
_MAX_LABEL_BYTES = 2**24


class _Sample(NamedTuple):
    image: File
    label: File | None


def find(listing: Listing) -> Pictures | None:
    """Finds the samples of all shards; returns None if the files are not from shards.

    Raises:
        ValueError: a label is damaged, or only some samples have one.
    """
    in_tars = [file for file in listing.files if file.path.endswith('.tar')]
    samples, siblings = _samples(in_tars)
    others = len(listing.files) - len(in_tars)
    if not samples or 2 * siblings < len(samples) or others and _any_image(listing):
        return None
    labelled = any(sample.label for sample in samples)
    if labelled:
        without = next((sample.image for sample in samples if sample.label is None), None)
        if without:
            raise ValueError(
                f'{without.path} has {without.name} without a .cls or .json, which other images '
                'have; add it, or remove the image.'
            )
    labels = [_label(sample.label) for sample in samples] if labelled else []
    if labels and not any(label is not None for label in labels):
        labels = []  # the .json files have no classes
    if None in labels:
        image = samples[labels.index(None)].image
        raise ValueError(
            f'{image.path} has {image.name} without a class in its .json, which other images '
            'have; add it, or remove the image.'
        )
    numbers = bool(labels) and all(type(label) is int for label in labels)
    if labels and not numbers and any(type(label) is int for label in labels):
        raise ValueError(
            f'{samples[0].image.path} and its sibling shards have both names and numbers as '
            'labels; write all labels in one way.'
        )
    classes = (
        None if not labels else
        [str(k) for k in range(max(labels) + 1)] if numbers else sorted(set(labels))
    )
    groups: dict[str | None, Group] = {}
    for k, (image, _) in enumerate(samples):
        # Only the names of shards and folders give the split; image names are arbitrary.
        split = split_in_path(image.name.rpartition('/')[0]) or split_in_path(
            image.path.rpartition('/')[2]
        )
        group = groups.setdefault(split, Group([], [] if classes else None))
        group.files.append(image)
        if classes:
            group.classes.append(str(labels[k]))
    return Pictures(groups, classes)


def _any_image(listing: Listing) -> bool:
    """Returns whether there are images outside tars."""
    return any(
        file.name.lower().rpartition('.')[2] in SUFFIXES
        for file in listing.files if not file.path.endswith('.tar')
    )


def _samples(in_tars: list[File]) -> tuple[list[_Sample], int]:
    """Returns the images in tars with their labels, and how many have a label or other sibling."""
    samples, siblings = [], 0
    for _, files in itertools.groupby(in_tars, _key):  # they are sorted by name
        found = {file.name.rpartition('/')[2].partition('.')[2].lower(): file for file in files}
        image = next((found[kind] for kind in SUFFIXES if kind in found), None)
        if image is None:
            continue
        label = next((found[kind] for kind in _LABELS if kind in found), None)
        samples.append(_Sample(image, label))
        # A folder inside the tar may be a class, even if its images have sibling files.
        folder, tar = os.path.dirname(image.name), os.path.basename(image.path)
        in_folder = folder and os.path.basename(folder) != tar.removesuffix('.tar')
        siblings += 'cls' in found or not in_folder and any(kind not in SUFFIXES for kind in found)
    return samples, siblings


def _key(file: File) -> tuple[str, str]:
    folder, _, name = file.name.rpartition('/')
    return file.path, f'{folder}/{name.partition(".")[0]}'


def _label(file: File) -> int | str | None:
    try:
        if not 0 <= file.size <= _MAX_LABEL_BYTES:
            raise ValueError(f'it has {file.size} bytes')
        text = listings.read(file).decode('utf-8').strip()
        label = text
        if file.name.lower().endswith('.json'):
            content = json.loads(text)
            content = content if isinstance(content, dict) else {}
            label = next((content[key] for key in _KEYS if key in content), None)
            if label is None:
                return None
        if isinstance(label, str) and label.lstrip('-').isdecimal():
            label = int(label)
        if type(label) is int and 0 <= label < 10**6 or isinstance(label, str) and label:
            return label
        raise ValueError(f'the label is {str(label)[:50]!r}')
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{file.path} has a damaged {file.name} ({error}); write the shard again.'
        ) from error
