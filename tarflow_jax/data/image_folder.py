"""Image files of a folder as a source, resized and cropped as `prepare` does."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tarflow_jax.data import sizes
from tarflow_jax.data.image_files import Form, encode_files
from tarflow_jax.data.listing import list_source, printable
from tarflow_jax.data.png import read_png

CHANNELS = (1, 3)


class ImageFolder:
    """A source, see `sources`, of the images in a folder, .zip or .tar and all folders inside it.

    The label of an image is that of the class whose name, or number, its folder has; -1 elsewhere.

    Args:
        path: the folder or archive.
        image_shape: (H, W, C) that images are brought to.
        class_names: of the flow, by label; None where it has no classes, or they have no names.
        num_classes: of the flow.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: no file of it is an image, or the flow's images have no 1 or 3 channels.

    Attributes:
        names: of the image files, relative to `path`.
        problems: (name, reason) of the files that were left out.
        notes: (name, what to know of it) of files that were not taken as they are.
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
        if not path.exists():
            raise FileNotFoundError(f'{path} is not there.')
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
        for file in found.files:
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
            raise ValueError(f'{path} holds no image that can be read{first}.')
        self.about = {
            'dataset': str(path), 'images': len(self.names),
            'size': sizes.text((height, width)),
        }

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i) -> dict:
        return {'image': read_png(self._files[int(i)]), 'label': np.int32(self._labels[int(i)])}
