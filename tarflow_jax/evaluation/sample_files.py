"""Writes and opens finished sets of samples, in formats that other evaluation suites read.

A set is a folder with `samples.json`, which describes the images, and one of these:

- `samples.npz` in the layout of the ADM suite: `arr_0` uint8 [N, H, W, C], and with classes `arr_1`
  int64 [N]. Grey images keep one channel; the ADM suite scores only RGB.
- a folder `array_record-N` like those of `data.prepare`, which TFDS reads too (split `samples`).
"""

import itertools
import logging
import zipfile
from collections.abc import Iterable, Iterator
from concurrent import futures
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tarflow_jax import files, json_files, paths, wrong_files
from tarflow_jax.data import arrays, image_files, kinds, manifest, shards, sizes, sources, splits
from tarflow_jax.training.over_set import View

ABOUT = 'samples.json'
SPLIT = 'samples'
FORMATS = ('npz', 'array_record')
TOTALS = ('count', 'redraws', 'redrawn', 'not_finite')  # numbers of images
ENCODERS = 8  # threads; zlib releases the GIL
_ABOUT = {'format': str, 'fingerprint': dict} | dict.fromkeys(TOTALS, int)

log = logging.getLogger(__name__)


def write_npz(path, pieces: Iterable[np.ndarray], shape, labels: np.ndarray | None) -> None:
    """Writes images, given in pieces, and labels in ADM's layout; equal images give equal bytes.

    Args:
      pieces: uint8 [n, H, W, C] each, `shape` [N, H, W, C] in total; in memory one at a time.
      labels: [N] or None.
    """
    arrays = [('arr_0', np.dtype(np.uint8), shape, pieces)]
    if labels is not None:
        arrays.append(('arr_1', np.dtype(np.int64), labels.shape, [labels.astype(np.int64)]))
    with files.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:
        for name, dtype, shape, pieces in arrays:
            header = {'descr': dtype.str, 'fortran_order': False, 'shape': tuple(shape)}
            # A ZipInfo has a fixed date, which makes the bytes reproducible.
            with archive.open(zipfile.ZipInfo(f'{name}.npy'), 'w', force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for piece in pieces:
                    member.write(np.ascontiguousarray(piece, dtype).data)


def write_array_record(
    path, pieces: Iterable[np.ndarray], shape, labels, class_names: list[str]
) -> None:
    """Writes images, given in pieces, and their labels as a prepared dataset.

    Args:
      path: a folder, which appears atomically.
      pieces, shape, labels: as for `write_npz`.
    """
    count, size, channels = shape[0], tuple(shape[1:3]), shape[3]
    images = (image for piece in pieces for image in piece)

    def tasks(start: int, stop: int) -> Iterator[splits.Task]:
        for first in range(start, stop, splits.IMAGES_PER_TASK):
            rows = range(first, min(first + splits.IMAGES_PER_TASK, stop))
            batch = np.stack(list(itertools.islice(images, len(rows))))
            yield splits.Task(
                [f'sample {row}' for row in rows],
                [-1] * len(rows) if labels is None else labels[rows.start : rows.stop].tolist(),
                image_files.encode_array, (batch, size),
            )

    places = shards.bounds(count, splits.images_per_shard(size, channels))
    names = shards.names('samples', SPLIT, len(places))
    none = {'count': 0, 'list': []}
    with files.replacing_folder(path) as temporary:
        (temporary / manifest.PROGRESS).mkdir()
        folder = manifest.folder_path(str(temporary))
        with futures.ThreadPoolExecutor(ENCODERS) as pool, tqdm(disable=True) as progress:
            told = shards.write(
                folder, splits.Split(count, '', tasks, []), dict(zip(names, places)), pool=pool,
                workers=ENCODERS, labelled=labels is not None, strict=True, progress=progress,
            )
        paths.remove_tree(temporary / manifest.PROGRESS)
        keys = ('name', 'records', 'bytes', 'sha256')
        manifest.write(folder, {
            'format': manifest.FORMAT, 'dataset': 'samples', 'kind': kinds.SAMPLES,
            'tfds_name': 'samples',
            'image': {'size': sizes.plain(size), 'channels': channels, 'encoding': 'png'},
            'preprocessing': f'none: drawn as {ABOUT} says',
            'classes': None if labels is None else class_names,
            'splits': {SPLIT: {
                'images': count, 'shards': [{k: told[name][k] for k in keys} for name in names],
                'skipped': none, 'notes': none,
            }},
        })


def images_path(folder: Path, about: dict) -> Path:
    """Returns the path of the images that `samples.json` describes."""
    npz = about['format'] == 'npz'
    return folder / ('samples.npz' if npz else f'array_record-{about["count"]}')


def read_about(folder: Path) -> dict | None:
    """Reads `samples.json`; returns None if the set is unfinished or the file is damaged."""
    path = folder / ABOUT
    try:
        about = json_files.read(path, _ABOUT)
        if about['format'] not in FORMATS or min(about[name] for name in TOTALS) < 0:
            raise json_files.Damaged(f'it has {about}'[:200])
    except FileNotFoundError:
        return None
    except json_files.Damaged as error:
        log.warning('%s is damaged (%s); ignoring it', path, error)
        return None
    return about


def open_samples(path, count: int | None = None):
    """Opens a finished set of samples as a source (see `data.sources`); images stay on disk.

    Args:
      path: the folder that sampling wrote, its `array_record-N`, or any `.npz` in the layout of the
        ADM suite.
      count: number of images to use, from the first; None for all.
    Raises:
      FileNotFoundError: if the path does not exist, or the set is unfinished.
      ValueError: if the file has another layout, is damaged, or has fewer images.
    """
    path, whole = paths.of(path), None
    if path.is_dir() and not (path / manifest.FILE).exists():
        about = read_about(path)
        if about is None:
            raise FileNotFoundError(
                f'{path} has no finished set of samples: {ABOUT} is missing or damaged; run '
                '--mode=sample with the same config to finish it.'
            )
        path, whole = images_path(path, about), about['count']
    if not path.exists():
        raise FileNotFoundError(
            f'{path} does not exist; run --mode=sample, or correct the path.'
        )
    if path.is_dir():
        source = sources.load('prepared', SPLIT, path=str(path))
    else:
        images, labels = _read_npz(paths.local_copy(path))
        source = sources.InMemory(images, labels, {
            'dataset': path.parent.name if path.name == 'samples.npz' else path.name,
            'split': SPLIT, 'images': len(images),
        })
    if whole not in (None, len(source)):
        raise ValueError(
            f'{path} has {len(source)} images, but its {ABOUT} has {whole}; sample them again in '
            'another folder.'
        )
    if count is not None and len(source) < count:
        raise ValueError(f'{path} has {len(source)} images, but {count} are needed; sample more.')
    if count in (None, len(source)):
        return source
    return View(source, range(count), about=source.about | {'images': count})


def _read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads images uint8 [N, H, W, C] and labels int32 [N], -1 for no label."""
    wanted = 'samples need arr_0, uint8 [N, H, W, 1 or 3], and optionally arr_1, labels [N]'
    names: list[str] = []
    try:
        members = arrays.members(path)
        names = list(members)
        if 'arr_0' not in members:
            raise ValueError(f'it has {", ".join(members)[:60] or "nothing"}')
        images = arrays.mapped(path, members['arr_0'])
        labels = arrays.read(path, members['arr_1']) if 'arr_1' in members else None
    except (ValueError, OSError) as error:
        other = None if 'arr_0' in names else wrong_files.described(path)
        what = other or f'is not a .npz of samples ({error})'
        raise ValueError(f'{path} {what}; {wanted}.') from None
    grey_or_colour = images.ndim == 4 and images.shape[3] in (1, 3)
    if images.dtype != np.uint8 or not images.size or not grey_or_colour:
        raise ValueError(f'{path}: arr_0 is {images.dtype} {list(images.shape)}; {wanted}.')
    if labels is None:
        labels = np.full(len(images), -1)
    if labels.shape != images.shape[:1] or labels.dtype.kind not in 'iu':
        raise ValueError(
            f'{path}: arr_1 is {labels.dtype} {list(labels.shape)} for {len(images)} images; '
            f'{wanted}.'
        )
    return images, labels.astype(np.int32)

