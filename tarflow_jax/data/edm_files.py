"""Reads zips and folders written by the dataset_tool.py of StyleGAN and EDM.

They have images of one size, such as 00000/img00000000.png, and dataset.json with their labels.
"""

import json
import re

from tarflow_jax.data import image_files
from tarflow_jax.data import listing as listings
from tarflow_jax.data.image_files import SUFFIXES
from tarflow_jax.data.listing import File, Listing
from tarflow_jax.data.splits import Group, Pictures

INDEX = 'dataset.json'
_NAME = re.compile(r'(?:.*/)?\d{5}/img\d{8}\.\w+')
_MAX_INDEX_BYTES = 2**29
_LOOKED_AT = 8  # tries at most this many images to find the size


def find(listing: Listing, rotate: bool = False) -> Pictures | None:
    """Finds the images of such a dataset; returns None for any other source.

    Raises:
        ValueError: dataset.json is damaged, or its labels do not match the images.
    """
    index = next(
        (file for file in listing.files
         if file.name.rpartition('/')[2] == INDEX and file.name.count('/') < 2), None,
    )
    if index is None:
        if not all(_NAME.fullmatch(file.name) for file in listing.files):
            return None
        return _pictures(listing.files, None, rotate)
    content = _read(index)
    if not isinstance(content, dict) or 'labels' not in content:
        return None
    prefix = index.name.removesuffix(INDEX)
    files = [
        file for file in listing.files
        if file.name.startswith(prefix) and file.name.lower().rpartition('.')[2] in SUFFIXES
    ]
    if not content['labels']:
        return _pictures(files, None, rotate)
    try:
        label_of = {prefix + name: label for name, label in content['labels']}
    except (TypeError, ValueError):
        label_of = {}
    labels = [label_of.get(file.name) for file in files]
    for file, label in zip(files, labels):
        if type(label) is not int or not 0 <= label < 10**6:
            raise ValueError(
                f'{index.path} gives {file.name} the label {label!r} in {INDEX}, which is not a '
                'whole number, 0 or more; write it again with one number for each image.'
            )
    return _pictures(files, labels, rotate)


def _pictures(files: list[File], labels: list[int] | None, rotate: bool) -> Pictures:
    classes = None if labels is None else [str(k) for k in range(max(labels, default=0) + 1)]
    group = Group(files, None if labels is None else [classes[label] for label in labels])
    sizes = (image_files.size_of(file, rotate) for file in files[:_LOOKED_AT])
    size = next(filter(None, sizes), None)
    return Pictures({None: group}, classes, size)


def _read(index: File) -> object:
    if index.size > _MAX_INDEX_BYTES:
        raise ValueError(f'{index.path} has a {INDEX} of {index.size} bytes; correct it.')
    try:
        return json.loads(listings.read(index))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{index.path} has a damaged {INDEX} ({type(error).__name__}: {error}); write it '
            'again.'
        ) from error
