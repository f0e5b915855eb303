"""Writes the shards of a split: many processes encode, one writes in order.

A shard is written under another name, and renamed when it is complete and flushed to disk. Then a
small file in the progress folder records its contents. After a crash, writing resumes after the
last recorded shard, and the result is identical to the byte.
"""

import collections
import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent import futures
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from tarflow_jax import json_files, paths
from tarflow_jax.data import manifest as manifests
from tarflow_jax.data.image_files import COUNTED, Encoded
from tarflow_jax.data.splits import Split, Task

log = logging.getLogger('tarflow_jax')

# One record per group, so that one image can be read alone. PNG is already compressed.
WRITER_OPTIONS = 'group_size:1,uncompressed'
TASKS_AHEAD_PER_WORKER = 4
_TOLD = manifests.SHARD | {'skipped': [[str]], 'notes': [[str]]}


def bounds(count: int, per_shard: int) -> list[tuple[int, int]]:
    """Returns (start, stop) of every shard: as few shards as possible, of nearly equal size."""
    shards = -(-count // per_shard)
    edges = [count * k // shards for k in range(shards + 1)]
    return list(itertools.pairwise(edges))


def names(tfds_name: str, split: str, shards: int) -> list[str]:
    return [f'{tfds_name}-{split}.array_record-{k:05d}-of-{shards:05d}' for k in range(shards)]


def finished(folder: epath.Path, names: list[str]) -> dict[str, dict]:
    """Returns the records in the progress folder of finished, undamaged shards, by name."""
    told = {}
    for name in names:
        path = folder / manifests.PROGRESS / f'{name}.json'
        try:
            told[name] = json_files.read(path, _TOLD)
            if told[name]['name'] != name:
                raise json_files.Damaged(f'it belongs to {told[name]["name"][:80]}')
        except FileNotFoundError:
            continue
        except json_files.Damaged as error:
            log.warning('%s is damaged (%s); the shard will be written again', path, error)
            told.pop(name, None)
            if path.is_dir():
                path.rmtree()
    damaged = manifests.damage(folder, list(told.values()), contents=True)
    return {name: shard for name, shard in told.items() if name not in damaged}


@contextlib.contextmanager
def worker_processes(workers: int) -> Iterator[futures.Executor]:
    """Starts processes for encoding, which end with this process, even after a crash."""
    pool = futures.ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context('spawn'), initializer=_start_worker
    )
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def write(folder: epath.Path, split: Split, places: dict[str, tuple[int, int]], *,
          pool: futures.Executor, workers: int, labelled: bool, strict: bool, progress,
          wanted: dict[str, str] | None = None) -> dict[str, dict]:
    """Writes shards and their records in the progress folder.

    Args:
        folder: the folder of the prepared dataset.
        split: the source of the images.
        places: (start, stop) of the shards to write, by name.
        pool: see `worker_processes`.
        workers: number of processes in the pool.
        labelled: whether elements have a label.
        strict: whether an image that cannot be used is an error.
        progress: a progress bar that counts images.
        wanted: expected checksums of the shards, by name.

    Returns:
        The records in the progress folder, by shard name: 'name', 'records', 'bytes', 'sha256',
        and lists of [image, text] as 'skipped' and 'notes'.

    Raises:
        ValueError: an image cannot be used, with `strict`; or a checksum differs from `wanted`.
        OSError: images have become unreadable, or shards cannot be written.
    """
    tasks = (
        (name, task) for name, (start, stop) in places.items() for task in split.tasks(start, stop)
    )
    results = _in_order(pool, tasks, TASKS_AHEAD_PER_WORKER * workers)
    written = {}
    for name, group in itertools.groupby(results, key=lambda result: result[0]):
        local_set = manifests.is_local(folder)
        part = folder / manifests.PROGRESS / f'{name}.part' if local_set else folder / name
        with _local_file(part) as local:
            shard = _write_shard(
                local, ((task, encoded) for _, task, encoded in group), labelled, strict, progress
            )
            shard = {'name': name, **shard}
            if wanted and shard['sha256'] != wanted[name]:
                raise ValueError(
                    f'{name} cannot be reproduced, because the images, Pillow or zlib changed; '
                    f'delete {folder} and prepare the dataset again.'
                )
        if local_set:
            part.replace(folder / name)
            manifests.sync(folder)
        manifests.replace(folder / manifests.PROGRESS / f'{name}.json', json.dumps(shard))
        log.info('wrote %s: %d images', name, shard['records'])
        written[name] = shard
    return written


def _write_shard(local: str, results, labelled: bool, strict: bool, progress) -> dict[str, Any]:
    skipped, notes, records = [], [], 0
    with _writer(local) as writer:
        for task, encoded in results:
            vectors = itertools.repeat(None) if task.features is None else task.features
            for name, label, vector, image in zip(task.names, task.labels, vectors, encoded):
                for note in image.notes:
                    if note not in COUNTED:
                        log.info('%s %s', name, note)
                    notes.append([name, note])
                if image.png is not None:
                    writer.write(_record(image.png, label if labelled else None, vector))
                    records += 1
                    continue
                if strict:
                    raise ValueError(
                        f'{name} {image.reason}; fix or remove it, or leave out --strict.'
                    )
                log.warning('%s %s; skipped', name, image.reason)
                skipped.append([name, image.reason])
            progress.update(len(encoded))
    manifests.sync(local)
    return {
        'records': records,
        'bytes': os.path.getsize(local),
        'sha256': manifests.sha256(epath.Path(local)),
        'skipped': skipped,
        'notes': notes,
    }


@contextlib.contextmanager
def _writer(path: str) -> Iterator[array_record_module.ArrayRecordWriter]:
    """Opens a writer and closes it at the end; raises OSError if writing fails (full disk)."""
    try:
        writer = array_record_module.ArrayRecordWriter(path, WRITER_OPTIONS)
        try:
            yield writer
        finally:
            writer.close()
    except RuntimeError as error:  # the only type that the writer raises
        raise OSError(str(error)) from error


@contextlib.contextmanager
def _local_file(target: epath.Path) -> Iterator[str]:
    """Yields a local file to write: the target, or one that is copied to the target at the end."""
    if manifests.is_local(target):
        yield os.fspath(target)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / target.name
        yield str(local)
        paths.upload(local, paths.of(target))


def _record(png: bytes, label: int | None, features: np.ndarray | None) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2  # slow to import for every worker

    example = tf_example_pb2.Example()
    example.features.feature['image'].bytes_list.value.append(png)
    if label is not None:
        example.features.feature['label'].int64_list.value.append(label)
    if features is not None:
        example.features.feature['features'].float_list.value.extend(features.tolist())
    return example.SerializeToString(deterministic=True)


def _in_order(
    pool: futures.Executor, tasks: Iterator[tuple[str, Task]], ahead: int
) -> Iterator[tuple[str, Task, list[Encoded]]]:
    """Runs the tasks in the pool, at most `ahead` at a time; yields them with their results."""
    running = collections.deque()
    for name, task in tasks:
        with _interrupts_held():
            running.append((name, task, pool.submit(task.function, *task.arguments)))
        if len(running) > ahead:
            name, task, future = running.popleft()
            yield name, task._replace(arguments=()), future.result()
    for name, task, future in running:
        yield name, task, future.result()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Defers Ctrl-C; processes started in the meantime ignore it."""
    resource_tracker.ensure_running()  # started inside, it would end the deferral
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    warnings.simplefilter('ignore')  # Pillow's warnings, which do not name the file
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
