"""Reads, writes and checks manifest.json, which describes a prepared dataset and how it was made.

The folder also has TFDS's dataset_info.json and features.json, so that
`tfds.builder_from_directory(folder).as_data_source(split)` reads the dataset too.
"""

import hashlib
import json
import os
import tempfile
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from tarflow_jax import files, json_files, paths
from tarflow_jax.data import kinds, sizes

FILE = 'manifest.json'
FORMAT = 1
PROGRESS = 'progress'
SHARD = {'name': str, 'records': int, 'bytes': int, 'sha256': str}
_LISTED = {'count': int, 'list': list}
_SHAPE = {
    'dataset': str, 'tfds_name': str, 'preprocessing': str, 'classes': (None, [str]),
    'image': {'size': (int, [int]), 'channels': int, 'crop?': str}, 'features?': [str],
    'kind?': (None, str),
    'splits': {str: {
        'images': int, 'plan?': str, 'shards': [SHARD], 'skipped': _LISTED, 'notes': _LISTED,
    }},
}
_VERIFY_THREADS = 8
_CHUNK_BYTES = 2**20


def folder_path(folder: str) -> epath.Path:
    """Returns the path of a folder, local or `gs://`.

    Raises:
        ValueError: the folder is in a bucket, and the package for buckets is missing.
    """
    return epath.Path(paths.of(os.path.expanduser(folder)))


def is_local(folder: epath.Path) -> bool:
    return not paths.in_bucket(folder)


def read(folder: epath.Path) -> dict[str, Any] | None:
    """Reads the manifest; returns None if there is none. Adds the kind to older manifests.

    Raises:
        ValueError: it is damaged, or its format belongs to another version of this package.
    """
    path = folder / FILE
    try:
        manifest = json_files.read(path, {'format': int})
        if manifest['format'] == FORMAT:
            _check(manifest)
    except FileNotFoundError:
        return None
    except json_files.Damaged as error:
        raise ValueError(
            f'{path} is damaged ({error}); delete {folder} and prepare the dataset again.'
        ) from error
    if manifest['format'] != FORMAT:
        raise ValueError(
            f'{path} has the format {manifest["format"]}, but this version reads {FORMAT}; prepare '
            'the dataset again with this version, in another folder.'
        )
    manifest.setdefault('kind', kinds.of_set(manifest))
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    json_files.check(manifest, _SHAPE)
    size, classes = manifest['image']['size'], manifest['classes']
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or min(*sides, manifest['image']['channels']) < 1:
        raise json_files.Damaged(f'its images are {manifest["image"]}'[:100])
    if classes is not None and not classes:
        raise json_files.Damaged('it has no class names')
    for key, split in manifest['splits'].items():
        counts = [split['images'], *(shard['records'] for shard in split['shards'])]
        if min(counts) < 0 or counts[0] != sum(counts[1:]) or not counts[0]:
            raise json_files.Damaged(f'its split {key[:40]!r} and its shards have different counts')
        for name in (shard['name'] for shard in split['shards']):
            if not name or '/' in name or name.startswith('.'):
                raise json_files.Damaged(f'it names a shard {name[:40]!r}')


def write(folder: epath.Path, manifest: dict[str, Any]) -> None:
    """Writes TFDS's files and then the manifest, each atomically."""
    for name, content in _tfds_files(manifest).items():
        replace(folder / name, content)
    replace(folder / FILE, json.dumps(manifest, indent=1, ensure_ascii=False) + '\n')


def replace(path: epath.Path, content: str) -> None:
    """Writes a file atomically: under another name, then renamed; in a bucket, directly."""
    if not is_local(path):
        files.write_text(path, content)
        return
    temporary = path.parent / f'{path.name}.part'
    temporary.write_text(content)
    sync(temporary)
    temporary.replace(path)


def sync(path: os.PathLike | str) -> None:
    """Flushes a local file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open('rb') as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def damage(folder: epath.Path, shards: list[dict], *, contents: bool) -> dict[str, str]:
    """Returns the damaged shards with the reason: missing, wrong size or wrong checksum.

    Args:
        folder: the folder of the shards.
        shards: their entries in the manifest.
        contents: whether to read the shards and compare checksums.
    """

    def examine(shard: dict) -> str | None:
        path = folder / shard['name']
        try:
            size = path.stat().length
        except FileNotFoundError:
            return 'is missing'
        if size != shard['bytes']:
            return f'has {size} bytes instead of {shard["bytes"]}'
        if contents and sha256(path) != shard['sha256']:
            return 'does not match the checksum in the manifest'
        return None

    with futures.ThreadPoolExecutor(_VERIFY_THREADS) as pool:
        found = pool.map(examine, shards)
        return {shard['name']: wrong for shard, wrong in zip(shards, found) if wrong}


def _tfds_files(manifest: dict[str, Any]) -> dict[str, str]:
    import tensorflow_datasets as tfds  # slow to import, and only needed at the end

    shape = (*sizes.pair(manifest['image']['size']), manifest['image']['channels'])
    features = {'image': tfds.features.Image(shape=shape, encoding_format='png')}
    if manifest['classes'] is not None:
        features['label'] = tfds.features.ClassLabel(names=manifest['classes'])
    if 'features' in manifest:
        size = len(manifest['features'])
        features['features'] = tfds.features.Tensor(shape=(size,), dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder:
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=manifest['tfds_name'], filetype_suffix='array_record',
            template='{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}',
        )
        info = tfds.core.DatasetInfo(
            builder=tfds.core.dataset_info.DatasetIdentity(
                name=manifest['tfds_name'], version=tfds.core.Version('1.0.0'), data_dir=folder,
                module_name='',
            ),
            features=tfds.features.FeaturesDict(features),
            description=f'{manifest["dataset"]}; {manifest["preprocessing"]}.',
        )
        info.set_file_format('array_record')
        info.set_splits(tfds.core.splits.SplitDict([
            tfds.core.SplitInfo(
                name=name, shard_lengths=[shard['records'] for shard in split['shards']],
                num_bytes=sum(shard['bytes'] for shard in split['shards']),
                filename_template=template,
            )
            for name, split in manifest['splits'].items()
        ]))
        info.write_to_directory(folder)
        return {
            path.name: path.read_text(encoding='utf-8') for path in sorted(Path(folder).iterdir())
        }
