"""Batches of uint8 images through Grain, as a pure function of the global step.

Because batch k depends on nothing but the source, the seed and k, a run resumes at any step, with
any number of processes, and no state of an iterator has to be kept in a checkpoint.
"""

import functools
import os
import shutil
import sys

import grain
import numpy as np
from absl import flags

from tarflow_jax.data.cores import available_cores

# Grain's own 16 threads and 500 elements are meant for single images; here an element is a batch.
READ_OPTIONS = grain.ReadOptions(num_threads=8, prefetch_buffer_size=8)
BATCHES_AHEAD_PER_WORKER = 2
WORKERS_PER_CORE = 4
SHARED_MEMORY = '/dev/shm'


def train_batches(source, *, batch_size, seed, flip=False, start=0, rows=None, workers=0):
    """Shuffled training batches without end, from step `start` on.

    Every epoch is a new permutation of the whole source, and batches run across the border of
    epochs. The images of a global batch are the same whatever the number of processes, of
    workers, or `start`.

    Args:
        source: see `sources`; with workers it must pickle, as those of `sources` do.
        batch_size: images per step over all processes.
        seed: of the order and the flips, in [0, 2**32).
        flip: whether to mirror half of the images, left to right.
        start: first step to deliver; no image before it is read.
        rows: those of every global batch to deliver, this process's share; None is all.
        workers: processes that read ahead, for a source that is slow to decode; 0 reads ahead
            with threads. Workers are spawned: the main module needs an
            `if __name__ == '__main__'`.

    Returns:
        An iterator of {'image': uint8 [len(rows),H,W,C], 'label': int32 [len(rows)]}, and
        'features': float32 [len(rows),F] where the source has them; its `close()` ends the threads
        or workers.

    Raises:
        ValueError: the source is empty or the seed out of range.
    """
    if len(source) == 0:
        raise ValueError('the training set holds no image; choose another split.')
    if not 0 <= seed < 2**32:
        raise ValueError(f'the seed is {seed}; choose one in [0, 2**32).')
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    if flip:
        dataset = dataset.random_map(_flip_half)
    dataset = _share(dataset, batch_size, rows, start)
    dataset = dataset.to_iter_dataset(READ_OPTIONS)
    if workers > 0:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain's workers read flags, set or not
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=workers, per_worker_buffer_size=BATCHES_AHEAD_PER_WORKER
            )
        ).map(_owned)
    return iter(dataset)


def check_workers(source, rows: int, workers: int) -> None:
    """Checks that there is room for worker processes and the batches that they hand over.

    Args:
        rows: images of a batch that this process reads.

    Raises:
        ValueError: one sentence that begins with 'workers'.
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
    # What a worker reads ahead, the batch it is at, and the one that is being used.
    needed = workers * (BATCHES_AHEAD_PER_WORKER + 2) * rows * size
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else 0
    if needed > free:
        raise ValueError(
            f'workers {workers} hand over batches through {SHARED_MEMORY}, which has '
            f'{free / 2**20:.0f} MiB free and needs {needed / 2**20:.0f}; make it larger (docker '
            'run --shm-size=2g; in Kubernetes an emptyDir with medium: Memory mounted there), or '
            'set it to 0, which reads with threads.'
        )


def eval_batches(source, *, batch_size, rows=None):
    """The whole source once, in order; what fills up the last batch has mask 0.

    There are `ceil(len(source) / batch_size)` batches whatever the rows, even if those of the last
    are nothing but padding (copies of the last image).

    Args:
        rows: those of every global batch to deliver; None is all.

    Returns:
        An iterator, with `close()`, of {'image': uint8 [len(rows),H,W,C], 'label': int32
        [len(rows)], 'mask': float32 [len(rows)]}, and 'features': float32 [len(rows),F] where the
        source has them.
    """
    padded = -(-len(source) // batch_size) * batch_size
    dataset = grain.MapDataset.range(padded).map(functools.partial(_masked, source))
    return iter(_share(dataset, batch_size, rows, 0).to_iter_dataset(READ_OPTIONS))


def steps_per_epoch(source, batch_size):
    """Whole batches in the source: `len(source) // batch_size`.

    Raises:
        ValueError: batch_size is not positive, or larger than the source.
    """
    if not 1 <= batch_size <= len(source):
        raise ValueError(
            f'batch_size is {batch_size} and the training set holds {len(source)} images; '
            f'choose a batch size from 1 to {len(source)}.'
        )
    return len(source) // batch_size


def _share(dataset, batch_size, rows, start):
    """Batches of the given rows of every batch of `batch_size`, from batch `start` on."""
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    dataset = grain.MapDataset.source(_Rows(dataset, batch_size, rows))
    # With a remainder, Grain would round the endless length up, in floats, past what a len() holds.
    return dataset.batch(len(rows), drop_remainder=True)[start:]


class _Rows:
    """Elements of a dataset that are in the given rows of its batches, as a source for Grain."""

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
    # Workers deliver views of shared memory; any that lives until Python exits counts as leaked.
    return {name: np.array(value) for name, value in batch.items()}


def _masked(source, i):
    return {**source[min(i, len(source) - 1)], 'mask': np.float32(i < len(source))}
