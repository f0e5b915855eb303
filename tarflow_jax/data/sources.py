"""Random-access sources of images: the embedded set, IDX files, a prepared set, or a TFDS set.

A source has `len(source)` and `source[i] -> {'image': uint8 [H,W,C], 'label': int32 scalar}`, which
is what Grain reads from; where the set has features of its images, 'features': float32 [F] comes
beside them. Images stay uint8: they are scaled and dequantised on the device. Its `about` is a dict
for JSON that says which images these are: 'dataset', 'kind' (see `kinds`), 'split', 'images' and
more, such as 'features', their names. Its `class_names` are those of its classes by label, or None.
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
    """Opens a split of a set of images.

    Args:
        kind: 'embedded' (a part of Fashion-MNIST that comes with this package), 'idx' (a folder of
            IDX files), 'prepared' (what `python -m tarflow_jax.data.prepare` wrote) or 'tfds' (a
            TFDS set that lies ready).
        split: 'train' or 'test'; for prepared sets and TFDS, the set's own name of it, such as
            'validation'.
        path: the folder of the IDX files or of the prepared set, or the `data_dir` of TFDS.
        name: the TFDS name, such as 'imagenet_resized/64x64'.
        verify: of a prepared set, the share of the checksums that this process compares: its
            index, and the number of processes.

    Returns:
        A source, see the top of this file.

    Raises:
        FileNotFoundError: files are missing.
        ValueError: the kind or the split is unknown, or the files are damaged.
    """
    if kind in ('idx', 'tfds') and paths.in_bucket(path):
        raise ValueError(
            f'{path} is in a bucket, and images are read at random, which needs a disk: copy the '
            f'set to each machine first (gcloud storage cp --recursive {path} DIR), and give the '
            'folder that it is in then.'
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
            f'data.source is {kind!r}, which is none of {", ".join(openers)}; '
            f'the closest is {closest!r}.'
        )
    return openers[kind]()


def classes(kind, *, path='', name=''):
    """Names of the classes of a set by label, or None, and its kind; does not read its images.

    Args:
        kind, path, name: as for `load`, of a set that `load` opens.

    Raises:
        FileNotFoundError, ValueError: the set is not there or damaged.
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
    """Refuses a source that does not fit the model.

    Looks at the first image, and at every label where they are in memory; else at the first label
    and at the number of classes, where the source knows it.

    Args:
        source: see the top of this file.
        image_size: what the model takes, in pixels: one number for squares, else (height, width).
        channels: channels the model takes.
        num_classes: classes the model knows; 0 ignores the labels.
        what: what to call the source in an error, such as 'the training set'.
        num_features: features of an image the model takes; 0 ignores those of the source.
        every_class: whether the labels must go up to the last class, as those of a training set.

    Raises:
        ValueError: the source is empty, or its images, labels or features do not fit.
    """
    if len(source) == 0:
        raise ValueError(f'{what} holds no image; choose another split.')
    first = source[0]
    found = f'{first["image"].dtype} {list(first["image"].shape)}'
    needed = f'uint8 {[*sizes.pair(image_size), channels]}'
    if found != needed:
        raise ValueError(
            f'{what} holds images of {found}, but model.image_size = {image_size} and '
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
            f'{what} holds the label {wrong[0]}, but model.num_classes = {num_classes} takes '
            f'0 to {num_classes - 1} (-1 means unlabelled); set model.num_classes to the number '
            'of classes of the set, or to 0 to ignore labels.'
        )
    if known and known < num_classes:
        raise ValueError(
            f'model.num_classes = {num_classes}, but {what} has {known} classes, and the others '
            f'would stay untrained; set model.num_classes to {known}.'
        )


def _check_features(features, num_features, what):
    if features is None:
        raise ValueError(
            f'{what} holds no features, but model.num_features = {num_features}; prepare the set '
            'with --features=FILE, or set model.num_features to 0.'
        )
    if features.dtype != np.float32 or features.shape != (num_features,):
        raise ValueError(
            f'{what} holds features of {features.dtype} {list(features.shape)}, but '
            f'model.num_features = {num_features} needs float32 [{num_features}]; set '
            'model.num_features to the number of features of the set, or to 0 to ignore them.'
        )


def _prepared(path, split, verify):
    from tarflow_jax.data import prepared  # slow to import, and only this source needs it

    return prepared.prepared_source(path, split, verify)


@dataclass(frozen=True)
class InMemory:
    """A source whose images, uint8 [N,H,W,C], and labels, int32 [N], are in memory."""

    image_NxHxWxC: np.ndarray
    label_N: np.ndarray
    about: dict = field(default_factory=dict)
    class_names: list[str] | None = None

    def __len__(self):
        return len(self.image_NxHxWxC)

    def __getitem__(self, i):
        return {'image': self.image_NxHxWxC[i], 'label': self.label_N[i]}


def embedded(split):
    """The first 10,000 training or 2,000 test images of Fashion-MNIST, 28x28x1 in 10 classes.

    Raises:
        ValueError: the split is neither 'train' nor 'test'.
    """
    source = idx_folder(EMBEDDED_FOLDER, split)
    about = {'dataset': 'embedded part of Fashion-MNIST', 'kind': kinds.EMBEDDED}
    return replace(source, about=source.about | about, class_names=FASHION_MNIST)


def idx_folder(path, split):
    """A folder in the layout of MNIST: `train-images-idx3-ubyte`, `train-labels-idx1-ubyte`, ...

    The names of the test split start with `t10k`. Each file may end with `.gz`, and its name may
    have a dot before `idx` in place of the dash. Images are [N,H,W] or [N,H,W,C].

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the split is neither 'train' nor 'test', a file is damaged, or there are not as
            many labels as images.
    """
    if split not in IDX_PREFIXES:
        raise ValueError(
            f'the split is {split!r}, which IDX files do not have; choose one of '
            f'{", ".join(IDX_PREFIXES)}.'
        )
    image_path = _find_idx(path, f'{IDX_PREFIXES[split]}-images-idx3-ubyte')
    label_path = _find_idx(path, f'{IDX_PREFIXES[split]}-labels-idx1-ubyte')
    image, label = read_idx(image_path), read_idx(label_path)
    if image.ndim not in (3, 4):
        raise ValueError(
            f'{image_path} has the shape {image.shape}; images are [N,H,W] or [N,H,W,C], so give '
            'the right file this name.'
        )
    if label.shape != image.shape[:1]:
        raise ValueError(
            f'{image_path} holds {len(image)} images and {label_path} labels of shape '
            f'{label.shape}; fetch both again, from the same place.'
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
        raise ValueError(f'data.path is empty; set it to the folder that holds {name}[.gz].')
    dotted = name.replace('-idx', '.idx')
    for candidate in (name, f'{name}.gz', dotted, f'{dotted}.gz'):
        if (Path(folder) / candidate).is_file():
            return Path(folder) / candidate
    raise FileNotFoundError(
        f'{name} or {name}.gz is wanted and {Path(folder).absolute()} has neither; fetch the '
        'files {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz of the set into that folder, or '
        'correct data.path.'
    )


class TfdsSource:
    """A source that reads a prepared TFDS set record by record; label -1 where it has none.

    A feature called `features`, if it is a vector of numbers, comes with it as float32.
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
        numbers = [str(k) for k in range(len(names or ()))]  # what TFDS calls classes without names
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
        # A worker process opens the files itself, which also keeps it as quiet as this one.
        return tfds_source, self._recipe


def _vector_size(features):
    """F of a TFDS set whose feature called `features` holds F numbers; else None."""
    import tensorflow_datasets as tfds

    found = features['features'] if 'features' in features else None
    if not isinstance(found, tfds.features.Tensor) or len(found.shape) != 1:
        return None
    return found.shape[0] if np.dtype(found.np_dtype).kind in 'fiu' else None


def tfds_source(name, split, data_dir):
    """A TFDS set that lies prepared, as array_record, in `data_dir`; downloads nothing.

    Reading needs no TensorFlow; preparing a set with `tfds build` may need it, on any machine.

    Args:
        name: TFDS name, with the configuration if it has any: 'imagenet_resized/64x64'.
        split: TFDS split, such as 'train', 'validation' or 'train[:90%]'.
        data_dir: where TFDS keeps its sets; if empty, TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
        FileNotFoundError: the set is not there, or not as array_record.
        ValueError: the name is empty, the set has no such split or no feature called `image`, or
            its files are damaged.
    """
    if not name:
        raise ValueError('data.name is empty; set it to a name such as imagenet_resized/64x64.')
    import tensorflow_datasets as tfds  # slow to import, and only this source needs it

    data_dir = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    data_dir = os.path.expanduser(data_dir)
    with _quiet():
        try:
            examples = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
        except (ValueError, KeyError, AssertionError, NotImplementedError) as error:
            # A set that TFDS knows and that is not there makes it say anything from KeyError to
            # 'already prepared in the TFRECORD format'.
            says = str(error).partition('\n')[0]
            if says.startswith(('Unknown split', 'Error parsing split')):
                raise ValueError(f'{name} in {data_dir} has no split {split!r}: {says}') from error
            raise FileNotFoundError(
                f'{name} is wanted as array_record and {data_dir} does not hold it so; prepare it '
                f'with `tfds build {name} --data_dir={data_dir} --file_format=array_record`, or '
                'correct data.path and data.name.'
            ) from error
        features = examples.dataset_info.features
        if 'image' not in features:
            raise ValueError(
                f'{name} has the features {", ".join(features)} and none called image; choose '
                'a set of images.'
            )
        try:
            examples[0]  # now, because the first decoding is when TFDS recommends another decoder
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f'{name} in {data_dir} cannot be read: {error}; prepare the set again.'
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
