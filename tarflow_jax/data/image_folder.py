"""A source of the image files in a folder, resized and cropped as by `prepare`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tarflow_jax import paths
from tarflow_jax.data import sizes
from tarflow_jax.data.image_files import Form, encode_files
from tarflow_jax.data.listing import list_source, printable
from tarflow_jax.data.png import read_png

CHANNELS = (1, 3)


class ImageFolder:
    """A source (see `sources`) of all images in a folder, .zip or .tar, including subfolders.

    The label of an image is that of the class whose name, or number, its folder has; -1 elsewhere.

    Args:
        path: the folder or archive.
        image_shape: (H, W, C) of the resized images.
        class_names: class names of the flow, by label; None if it has no classes or no names.
        num_classes: number of classes of the flow.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it has no image, it is in a bucket, or the flow's images do not have 1 or 3
            channels.

    Attributes:
        names: names of the image files, relative to `path`.
        problems: (name, reason) of files that were left out.
        notes: (name, note) of files that were changed.
    """

    def __init__(
        self, path: Path, image_shape: tuple[int, int, int], class_names: Sequence[str] | None,
        num_classes: int = 0,
    ):
        height, width, channels = image_shape
        if channels not in CHANNELS:
            raise ValueError(
                f'{path} holds image files, which have 1 or 3 channels, and the flow has '
                f'{channels}.'
            )
        if paths.in_bucket(path):
            raise ValueError(
                f'{path} is in a bucket, and image files are read from a disk; copy the folder to '
                'this machine first.'
            )
        if not path.exists():
            raise FileNotFoundError(f'{path} does not exist.')
        found = list_source(path)
        label_of = {str(label): label for label in range(num_classes)}
        label_of |= {name: label for label, name in enumerate(class_names or ())}
        self.names: list[str] = []
        self.problems = list(found.problems.items())
        self.notes: list[tuple[str, str]] = []
        self.class_names = class_names
        self._labels: list[int] = []
        self._files: list[bytes] = []
        form = Form((height, width), channels=channels)
        for file in tqdm(found.files, 'reading images', leave=False, disable=None):
            [encoded] = encode_files([file], form)
            name = printable(file.name)
            if encoded.png is None:
                self.problems.append((name, encoded.reason))
                continue
            self.notes += [(name, note) for note in encoded.notes]
            self.names.append(name)
            folders = file.name.split('/')[:-1]
            self._labels.append(label_of.get(folders[-1], -1) if folders else -1)
            self._files.append(encoded.png)
        if not self.names:
            first = f': {self.problems[0][0]} {self.problems[0][1]}' if self.problems else ''
            raise ValueError(f'{path} has no readable image{first}.')
        self.about = {
            'dataset': str(path), 'images': len(self.names),
            'size': sizes.text((height, width)),
        }

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i) -> dict:
        return {'image': read_png(self._files[int(i)]), 'label': np.int32(self._labels[int(i)])}
