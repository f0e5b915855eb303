"""Batches of uint8 images, by Grain, as a pure function of the global step.

Batch k depends only on the source, the seed and k. So a run can resume at any step with any number
of processes, and checkpoints need no iterator state.
"""

import functools
import os
import shutil
import sys

import grain
import numpy as np
from absl import flags

from tarflow_jax.data.cores import available_cores

# Grain's defaults, 16 threads and 500 elements, suit single images; here an element is a batch.
READ_OPTIONS = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
BATCHES_AHEAD_PER_WORKER = 2
WORKERS_PER_CORE = 4
SHARED_MEMORY = '/dev/shm'


def train_batches(source, *, batch_size, seed, flip=False, start=0, rows=None, workers=0):
    """Yields shuffled training batches forever, starting at step `start`.

    Every epoch is a new permutation of the whole source, and batches may span two epochs. The
    images of a global batch do not depend on the number of processes or workers, or on `start`.

    Args:
        source: see `sources`. With workers, it must be picklable, as those of `sources` are.
        batch_size: images per step over all processes.
        seed: seed of the order and the flips, in [0, 2**32).
        flip: whether to mirror half of the images, left to right.
        start: first step to yield; earlier images are not read.
        rows: the rows of every global batch that belong to this process; None for all.
        workers: number of processes that prefetch, for a source that is slow to decode; with 0,
            threads prefetch. Workers are spawned, so the main module needs an
            `if __name__ == '__main__'`.

    Returns:
        An iterator of {'image': uint8 [len(rows),H,W,C], 'label': int32 [len(rows)]}, with
        'features': float32 [len(rows),F] if the source has them. Its `close()` stops the threads
        or workers.

    Raises:
        ValueError: the source is empty or the seed out of range.
    """
    if len(source) == 0:
        raise ValueError('the training set is empty; choose another split.')
    if not 0 <= seed < 2**32:
        raise ValueError(f'the seed is {seed}; choose one in [0, 2**32).')
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if flip:
        dataset = dataset.random_map(_flip_half)
    dataset = _share(dataset, batch_size, rows, start)
    dataset = dataset.to_iter_dataset(READ_OPTIONS)
    if workers > 0:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags even if none is set
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=BATCHES_AHEAD_PER_WORKER
            )
        ).map(_owned)
    return iter(dataset)


def check_workers(source, rows: int, workers: int) -> None:
    """Checks that the machine has enough cores and shared memory for the workers.

    Args:
        rows: images per batch that this process reads.

    Raises:
        ValueError: if not; the message starts with 'workers'.
    """
    if not workers:
        return
    most = WORKERS_PER_CORE * available_cores()
    if workers > most:
        raise ValueError(
            f'workers {workers} are too many for {available_cores()} cores; choose {most} or fewer.'
        )
    if not sys.platform.startswith('linux'):
        return
    size = sum(np.asarray(value).nbytes for value in source[0].values())
    # The batches that a worker prefetches, the one it is reading, and the one in use.
    needed = workers * (BATCHES_AHEAD_PER_WORKER + 2) * rows * size
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    if needed > free:
        raise ValueError(
            f'workers {workers} need {needed / 2**20:.0f} MiB in {SHARED_MEMORY} to pass batches, '
            f'which has {free / 2**20:.0f} MiB free; enlarge it (docker run --shm-size=2g; in '
            'Kubernetes an emptyDir with medium: Memory mounted there), or set workers to 0, which '
            'reads with threads.'
        )


def eval_batches(source, *, batch_size, rows=None):
    """Yields the whole source once, in order; padding in the last batch has mask 0.

    Every process gets `ceil(len(source) / batch_size)` batches, even if its rows of the last batch
    are all padding (copies of the last image).

    Args:
        rows: the rows of every global batch to yield; None for all.

    Returns:
        An iterator, with `close()`, of {'image': uint8 [len(rows),H,W,C], 'label': int32
        [len(rows)], 'mask': float32 [len(rows)]}, with 'features': float32 [len(rows),F] if the
        source has them.
    """
    padded = -(-len(source) // batch_size) * batch_size
    dataset = grain.MapDataset.range(padded).map(functools.partial(_masked, source))
    return iter(_share(dataset, batch_size, rows, 0).to_iter_dataset(READ_OPTIONS))


def steps_per_epoch(source, batch_size):
    """Returns the number of whole batches in the source, `len(source) // batch_size`.

    Raises:
        ValueError: batch_size is not positive, or larger than the source.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(
            f'batch_size is {batch_size}, but the training set has {len(source)} images; '
            f'choose a batch size from 1 to {len(source)}.'
        )
    return len(source) // batch_size


def _share(dataset, batch_size, rows, start):
    """Yields the given rows of every batch of `batch_size`, starting at batch `start`."""
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    dataset = grain.MapDataset.source(_Rows(dataset, batch_size, rows))
    # Keeping the remainder, Grain would round the infinite length up past the range of len().
    return dataset.batch(len(rows), drop_remainder=True)[start:]


class _Rows:
    """A Grain source of the elements in the given rows of a dataset's batches."""

    def __init__(self, dataset, batch_size, rows):
        self._dataset, self._batch_size, self._rows = dataset, batch_size, rows

    def __len__(self):
        return len(self._dataset) // self._batch_size * len(self._rows)

    def __getitem__(self, i):
        batch, row = divmod(i, len(self._rows))
        return self._dataset[batch * self._batch_size + int(self._rows[row])]


def _flip_half(element, rng):
    if rng.random() < 0.5:
        return element
    return {**element, 'image': element['image'][:, ::-1]}


def _owned(batch):
    # Workers pass views of shared memory; those alive when Python exits are reported as leaks.
    return {name: np.array(value) for name, value in batch.items()}


def _masked(source, i):
    return {**source[min(i, len(source) - 1)], 'mask': np.float32(i < len(source))}
