"""Random-access sources: the embedded images, IDX files, a prepared dataset, or a TFDS dataset.

A source has `len(source)` and `source[i] -> {'image': uint8 [H,W,C], 'label': int32 scalar}`, as
Grain expects. If the dataset has features, elements also have 'features': float32 [F]. Images stay
uint8; they are scaled and dequantized on the device.

`source.about` is a JSON dict that describes the images: 'dataset', 'kind' (see `kinds`), 'split',
'images' and more, such as 'features', the feature names. `source.class_names` has the class names
by label, or is None.
"""

import contextlib
import difflib
import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tarflow_jax import paths
from tarflow_jax.data import kinds, sizes
from tarflow_jax.data.idx import read_idx

EMBEDDED_FOLDER = Path(__file__).parent / 'embedded'
KINDS = ('embedded', 'idx', 'prepared', 'tfds')
IDX_PREFIXES = {'train': 'train', 'test': 't10k'}
FASHION_MNIST = [
    'T-shirt', 'trouser', 'pullover', 'dress', 'coat', 'sandal', 'shirt', 'sneaker', 'bag',
    'ankle boot',
]


def load(kind, split, *, path='', name='', verify=(0, 1)):
    """Opens a split of a dataset.

    Args:
        kind: 'embedded' (a part of Fashion-MNIST that comes with this package), 'idx' (a folder of
            IDX files), 'prepared' (written by `python -m tarflow_jax.data.prepare`) or 'tfds' (a
            TFDS dataset on disk).
        split: 'train' or 'test'; for prepared and TFDS datasets, the dataset's own name, such as
            'validation'.
        path: the folder of the IDX files or of the prepared dataset, or the `data_dir` of TFDS.
        name: the TFDS name, such as 'imagenet_resized/64x64'.
        verify: the index of this process and the number of processes that share the checksums of a
            prepared dataset.

    Returns:
        A source, see the top of this file.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the kind or the split is unknown, or the files are damaged.
    """
    if kind in ('idx', 'tfds') and paths.in_bucket(path):
        raise ValueError(
            f'{path} is in a bucket, which does not allow random access: copy the dataset to each '
            f'machine first (gcloud storage cp --recursive {path} DIR), and pass that folder.'
        )
    openers = {
        'embedded': lambda: embedded(split),
        'idx': lambda: idx_folder(path, split),
        'prepared': lambda: _prepared(path, split, verify),
        'tfds': lambda: tfds_source(name, split, path),
    }
    if kind not in openers:
        closest = difflib.get_close_matches(str(kind), openers, n=1, cutoff=0)[0]
        raise ValueError(
            f'data.source is {kind!r}, but must be one of {", ".join(openers)}; '
            f'the closest is {closest!r}.'
        )
    return openers[kind]()


def classes(kind, *, path='', name=''):
    """Returns a dataset's class names by label (or None) and its kind; reads no images.

    Args:
        kind, path, name: as for `load`.

    Raises:
        FileNotFoundError, ValueError: the dataset is missing or damaged.
    """
    if kind == 'embedded':
        return FASHION_MNIST, kinds.EMBEDDED
    if kind == 'prepared':
        from tarflow_jax.data import prepared

        return prepared.classes(path)
    if kind == 'tfds':
        source = tfds_source(name, 'train', path)
        return source.class_names, source.about['kind']
    return None, kinds.IDX


def check(source, *, image_size, channels, num_classes, what, num_features=0, every_class=False):
    """Checks that a source fits the model.

    Checks the first image. Checks all labels if they are in memory; else the first label, and the
    number of classes if the source knows it.

    Args:
        source: see the top of this file.
        image_size: image size of the model in pixels: one number, or (height, width).
        channels: channels of the model.
        num_classes: classes of the model; 0 ignores the labels.
        what: the name of the source in errors, such as 'the training set'.
        num_features: features of the model; 0 ignores those of the source.
        every_class: whether the labels must reach the last class, as in a training set.

    Raises:
        ValueError: the source is empty, or its images, labels or features do not fit.
    """
    if len(source) == 0:
        raise ValueError(f'{what} is empty; choose another split.')
    first = source[0]
    found = f'{first["image"].dtype} {list(first["image"].shape)}'
    needed = f'uint8 {[*sizes.pair(image_size), channels]}'
    if found != needed:
        raise ValueError(
            f'{what} has images of {found}, but model.image_size = {image_size} and '
            f'model.image_channels = {channels} need {needed}; change these two, or prepare the '
            'images.'
        )
    if num_features:
        _check_features(first.get('features'), num_features, what)
    if num_classes == 0:
        return
    known = len(source.class_names or ()) or source.about.get('classes')
    if isinstance(source, InMemory):
        labels = source.label_N
        known = known or (every_class and labels.max() + 1)
    else:
        labels = np.array([first['label'], (known or 1) - 1])
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise ValueError(
            f'{what} has the label {wrong[0]}, but model.num_classes = {num_classes} allows '
            f'0 to {num_classes - 1} (-1 means unlabelled); set model.num_classes to the number '
            'of classes in the dataset, or to 0 to ignore labels.'
        )
    if known and known < num_classes:
        raise ValueError(
            f'model.num_classes = {num_classes}, but {what} has {known} classes, so the others '
            f'would stay untrained; set model.num_classes to {known}.'
        )


def _check_features(features, num_features, what):
    if features is None:
        raise ValueError(
            f'{what} has no features, but model.num_features = {num_features}; prepare the dataset '
            'with --features=FILE, or set model.num_features to 0.'
        )
    if features.dtype != np.float32 or features.shape != (num_features,):
        raise ValueError(
            f'{what} has features of {features.dtype} {list(features.shape)}, but '
            f'model.num_features = {num_features} needs float32 [{num_features}]; set '
            'model.num_features to the number of features in the dataset, or to 0 to ignore them.'
        )


def _prepared(path, split, verify):
    from tarflow_jax.data import prepared  # slow to import; only this source needs it

    return prepared.prepared_source(path, split, verify)


@dataclass(frozen=True)
class InMemory:
    """A source of images, uint8 [N,H,W,C], and labels, int32 [N], in memory."""

    image_NxHxWxC: np.ndarray
    label_N: np.ndarray
    about: dict = field(default_factory=dict)
    class_names: list[str] | None = None

    def __len__(self):
        return len(self.image_NxHxWxC)

    def __getitem__(self, i):
        return {'image': self.image_NxHxWxC[i], 'label': self.label_N[i]}


def embedded(split):
    """Opens the first 10,000 training or 2,000 test images of Fashion-MNIST: 28x28x1, 10 classes.

    Raises:
        ValueError: the split is neither 'train' nor 'test'.
    """
    source = idx_folder(EMBEDDED_FOLDER, split)
    about = {'dataset': 'embedded part of Fashion-MNIST', 'kind': kinds.EMBEDDED}
    return replace(source, about=source.about | about, class_names=FASHION_MNIST)


def idx_folder(path, split):
    """Opens an MNIST-like folder: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, ...

    The names of the test split start with `t10k`. File names may end with `.gz`, and may have a dot
    instead of the dash before `idx`. Images are [N,H,W] or [N,H,W,C].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the split is neither 'train' nor 'test', a file is damaged, or the numbers of
            labels and images differ.
    """
    if split not in IDX_PREFIXES:
        raise ValueError(
            f'IDX files have no split {split!r}; choose one of '
            f'{", ".join(IDX_PREFIXES)}.'
        )
    image_path = _find_idx(path, f'{IDX_PREFIXES[split]}-images-idx3-ubyte')
    label_path = _find_idx(path, f'{IDX_PREFIXES[split]}-labels-idx1-ubyte')
    image, label = read_idx(image_path), read_idx(label_path)
    if image.ndim not in (3, 4):
        raise ValueError(
            f'{image_path} has the shape {image.shape}, but images are [N,H,W] or [N,H,W,C]; check '
            'which file has this name.'
        )
    if label.shape != image.shape[:1]:
        raise ValueError(
            f'{image_path} has {len(image)} images, but {label_path} has labels of shape '
            f'{label.shape}; download both again, from the same place.'
        )
    image_NxHxWxC = image[..., None] if image.ndim == 3 else image
    about = {
        'dataset': Path(path).absolute().name,
        'kind': kinds.IDX,
        'split': split,
        'images': len(image),
        'pixels_sha256': hashlib.sha256(image).hexdigest(),
    }
    return InMemory(image_NxHxWxC, label.astype(np.int32), about)


def _find_idx(folder, name):
    if not str(folder):
        raise ValueError(f'data.path is empty; set it to the folder with {name}[.gz].')
    dotted = name.replace('-idx', '.idx')
    for candidate in (name, f'{name}.gz', dotted, f'{dotted}.gz'):
        if (Path(folder) / candidate).is_file():
            return Path(folder) / candidate
    raise FileNotFoundError(
        f'{Path(folder).absolute()} has neither {name} nor {name}.gz; download the '
        'files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz into that folder, or correct '
        'data.path.'
    )


class TfdsSource:
    """A source that reads a prepared TFDS dataset record by record; label -1 means no label.

    A TFDS feature called `features` is included as float32 if it is a vector of numbers.
    """

    def __init__(self, examples, recipe):
        self._examples = examples
        self._recipe = recipe
        name, split, _ = recipe
        self.about = {
            'dataset': name,
            'kind': kinds.of_tfds(name),
            'split': split,
            'images': len(examples),
            'version': str(examples.dataset_info.version),
        }
        features = examples.dataset_info.features
        names = getattr(features['label'], 'names', None) if 'label' in features else None
        numbers = [str(k) for k in range(len(names or ()))]  # TFDS's names of unnamed classes
        self.class_names = None if names in (None, numbers) else list(names)
        size = _vector_size(features)
        if size is not None:
            self.about['features'] = [str(k) for k in range(size)]

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, i):
        example = self._examples[i]
        element = {'image': example['image'], 'label': np.int32(example.get('label', -1))}
        if 'features' in self.about:
            element['features'] = np.asarray(example['features'], np.float32)
        return element

    def __reduce__(self):
        # A worker process opens the files itself, which also silences TFDS there.
        return tfds_source, self._recipe


def _vector_size(features):
    """Returns F if the TFDS feature called `features` is a vector of F numbers; else None."""
    import tensorflow_datasets as tfds

    found = features['features'] if 'features' in features else None
    if not isinstance(found, tfds.features.Tensor) or len(found.shape) != 1:
        return None
    return found.shape[0] if np.dtype(found.np_dtype).kind in 'fiu' else None


def tfds_source(name, split, data_dir):
    """Opens a TFDS dataset in `data_dir` that is prepared as array_record; downloads nothing.

    Reading does not need TensorFlow. Preparing a dataset with `tfds build` may need it, on any
    machine.

    Args:
        name: TFDS name, with its configuration if it has one: 'imagenet_resized/64x64'.
        split: TFDS split, such as 'train', 'validation' or 'train[:90%]'.
        data_dir: TFDS's data folder; if empty, TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
        FileNotFoundError: the dataset is missing, or not prepared as array_record.
        ValueError: the name is empty, the dataset has no such split or no feature called `image`,
            or its files are damaged.
    """
    if not name:
        raise ValueError('data.name is empty; set it to a name such as imagenet_resized/64x64.')
    import tensorflow_datasets as tfds  # slow to import; only this source needs it

    data_dir = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    data_dir = os.path.expanduser(data_dir)
    with _quiet():
        try:
            examples = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
            # For a known but missing dataset, TFDS raises anything from KeyError to 'already
            # prepared in the TFRECORD format'.
            says = str(error).partition('\n')[0]
            if says.startswith(('Unknown split', 'Error parsing split')):
                raise ValueError(f'{name} in {data_dir} has no split {split!r}: {says}') from error
            raise FileNotFoundError(
                f'{data_dir} does not have {name} as array_record; prepare it '
                f'with `tfds build {name} --data_dir={data_dir} --file_format=array_record`, or '
                'correct data.path and data.name.'
            ) from error
        features = examples.dataset_info.features
        if 'image' not in features:
            raise ValueError(
                f'{name} has the features {", ".join(features)}, but none called image; choose '
                'an image dataset.'
            )
        try:
            examples[0]  # TFDS recommends another decoder at the first decoding; silence that here
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f'{name} in {data_dir} cannot be read: {error}; prepare the dataset again.'
            ) from error
    return TfdsSource(examples, (name, split, data_dir))


@contextlib.contextmanager
def _quiet():
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
