"""Reads prepared datasets: images by random access from ArrayRecord shards, checked when opened."""

import hashlib
import logging
import os
import shutil
import tempfile
import time
from concurrent import futures
from pathlib import Path

import numpy as np
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from tensorflow_datasets.proto import tf_example_pb2

from tarflow_jax import files
from tarflow_jax.data import kinds
from tarflow_jax.data import manifest as manifests
from tarflow_jax.data.png import read_png

log = logging.getLogger('tarflow_jax')

_THREADS = 16


class PreparedSource:
    """A source that reads a split record by record; label -1 means no label.

    Elements have features if the dataset has them. A worker process that unpickles the source opens
    the files itself and does not check them again.
    """

    def __init__(
        self, shards: list[tuple[str, int]], about: dict, class_names: list[str] | None = None
    ):
        """Takes each shard as its path and number of records."""
        self._shards = shards
        self.about = about
        self.class_names = class_names
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f'{path}[0:{records}]' for path, records in shards if records]
        )

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        feature = tf_example_pb2.Example.FromString(self._records[i]).features.feature
        label = feature['label'].int64_list.value if 'label' in feature else (-1,)
        image_HxWxC = read_png(feature['image'].bytes_list.value[0])
        element = {'image': image_HxWxC, 'label': np.int32(label[0])}
        if 'features' in feature:
            element['features'] = np.array(feature['features'].float_list.value, np.float32)
        return element

    def __reduce__(self):
        return PreparedSource, (self._shards, self.about, self.class_names)


def prepared_source(folder: str, split: str, verify: tuple[int, int] = (0, 1)) -> PreparedSource:
    """Opens a split that `prepare` wrote, and checks that it is complete.

    Sizes and numbers of records are always checked. Checksums, which read every byte, are checked
    for the shards `verify[0]::verify[1]` only, so that several processes can share the work.

    Args:
        folder: the prepared folder, local or gs://.
        split: the name of the split, such as 'train'.
        verify: the index of this process and the number of processes that share the checksums.

    Raises:
        FileNotFoundError: the folder has no prepared dataset.
        ValueError: the dataset has no such split, or a shard is missing or damaged.
    """
    path, manifest = _opened(folder)
    if split not in manifest['splits']:
        raise ValueError(
            f'{folder} has no split {split!r}; choose one of {", ".join(manifest["splits"])}, or '
            'prepare this split too.'
        )
    entry = manifest['splits'][split]
    if not manifests.is_local(path):
        path = _copied(path, entry['shards'])
    start = time.monotonic()
    share = entry['shards'][verify[0]::verify[1]]
    damaged = manifests.damage(path, entry['shards'], contents=False)
    damaged = damaged or manifests.damage(path, share, contents=True) or _miscounted(path, entry)
    if damaged:
        name, wrong = next(iter(damaged.items()))
        raise ValueError(
            f'{os.fspath(path / name)} {wrong} ({len(damaged)} of {len(entry["shards"])} shards '
            'are damaged); run the command that prepared the dataset again to repair them.'
        )
    seconds = time.monotonic() - start
    if seconds > 1:
        log.info(
            'checked %d of %d shards of %s in %.1f s', len(share), len(entry['shards']), folder,
            seconds,
        )
    about = {
        'dataset': manifest['dataset'],
        'kind': kinds.of_manifest(manifest),
        'split': split,
        'images': entry['images'],
        'skipped': entry['skipped']['count'],
        'classes': None if manifest['classes'] is None else len(manifest['classes']),
        'image': manifest['image'],
        'preprocessing': manifest['preprocessing'],
        'manifest_sha256': hashlib.sha256((path / manifests.FILE).read_bytes()).hexdigest(),
    }
    if 'features' in manifest:
        about['features'] = manifest['features']
    shards = [(os.fspath(path / shard['name']), shard['records']) for shard in entry['shards']]
    return PreparedSource(shards, about, kinds.class_names(manifest))


def classes(folder: str) -> tuple[list[str] | None, str | None]:
    """Returns a dataset's class names by label and its kind (see `kinds`); opens no shards.

    Raises:
        FileNotFoundError: the folder has no prepared dataset.
        ValueError: its manifest is damaged.
    """
    _, manifest = _opened(folder)
    return kinds.class_names(manifest), kinds.of_manifest(manifest)


def _opened(folder: str):
    if not folder:
        raise ValueError('data.path is empty; set it to a prepared folder.')
    path = manifests.folder_path(folder)
    manifest = manifests.read(path)
    if manifest is None:
        # `prepare` does not write to such a folder: most likely it has the originals.
        if manifests.is_local(path) and path.is_dir() and not (path / manifests.PROGRESS).exists():
            if any(path.iterdir()):
                raise FileNotFoundError(
                    f'{folder} has no {manifests.FILE}; if it has the original images, run '
                    f'`python -m tarflow_jax.data.prepare {folder} --out=DIR` and set data.path to '
                    'DIR, otherwise correct data.path.'
                )
        raise FileNotFoundError(
            f'{folder} has no {manifests.FILE}; prepare a dataset with `python -m '
            f'tarflow_jax.data.prepare SOURCE --out={folder}`, or correct data.path.'
        )
    return path, manifest


def _copied(folder: epath.Path, shards: list[dict]) -> epath.Path:
    """Copies the missing shards and the manifest of a dataset from a bucket to the disk.

    Each file appears atomically, so several processes of a machine do not interfere.

    Raises:
        OSError: the disk is too small.
    """
    manifest = (folder / manifests.FILE).read_bytes()
    name = f'tarflow_jax-{os.getuid()}'
    target = Path(tempfile.gettempdir()) / name / hashlib.sha256(manifest).hexdigest()[:16]
    target.mkdir(parents=True, exist_ok=True, mode=0o700)
    with files.replacing(target / manifests.FILE) as file:
        file.write(manifest)
    held = {path.name: path.stat().st_size for path in target.iterdir()}
    missing = [shard for shard in shards if held.get(shard['name']) != shard['bytes']]
    needed, free = sum(shard['bytes'] for shard in missing), shutil.disk_usage(target).free
    if needed > free:
        raise OSError(
            f'{folder} must be copied to disk for random access, which needs '
            f'{needed / 2**30:.1f} GiB, but {target.parent.parent} has {free / 2**30:.1f} GiB; set '
            'TMPDIR to a folder with more space.'
        )

    def copy(shard: dict) -> None:
        with files.replacing(target / shard['name']) as file:
            with (folder / shard['name']).open('rb') as there:
                shutil.copyfileobj(there, file, 2**20)

    if missing:
        log.info('copying %d shards (%.1f MB) of %s to %s', len(missing), needed / 1e6, folder,
                 target)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(copy, missing))
    return epath.Path(target)


def _miscounted(folder, entry: dict) -> dict[str, str]:
    """Returns shards that cannot be opened or whose number of records is wrong."""

    def examine(shard: dict) -> str | None:
        try:
            reader = array_record_module.ArrayRecordReader(os.fspath(folder / shard['name']))
            records = reader.num_records()
            reader.close()
        except (OSError, RuntimeError, ValueError) as error:
            return f'cannot be opened: {str(error).partition(chr(10))[0]}'
        if records != shard['records']:
            return f'has {records} records instead of {shard["records"]}'
        return None

    with futures.ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(examine, entry['shards'])
        return {shard['name']: wrong for shard, wrong in zip(entry['shards'], found) if wrong}
