"""Sampling in bulk: samples tens of thousands of images on all devices and saves them as it goes.

Each image has its own noise, which depends only on the seed and the index of the image. So the
images do not depend on the batch size or the mesh (except for rounding), and a set can be extended
later. Each batch is saved as a file, a *part*, before the next is sampled. After a crash, sampling
resumes after the existing parts.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tarflow_jax import files, json_files, lock, paths
from tarflow_jax.evaluation import sample_files, sample_parts
from tarflow_jax.evaluation.versions import versions
from tarflow_jax.flow.flow import architecture
from tarflow_jax.sampling.generate import generate
from tarflow_jax.sampling.noise import keys_of_examples, noise_of_examples
from tarflow_jax.sampling.sample import MAX_REDRAWS
from tarflow_jax.sampling.schedule import Schedule
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.digests import sums_of_hashes
from tarflow_jax.training.loop import Stopped
from tarflow_jax.training.over_set import images_of
from tarflow_jax.training.processes import Stop, by_first, from_first

SHEETS, PER_SHEET = 10, 100  # image grids, and images per grid
LOG_SECONDS = 60  # interval of progress lines when there is no progress bar

log = logging.getLogger(__name__)


def fingerprint(
    plan, variables, name: str, *, seed: int, tolerance=None
) -> dict:
    """Returns everything that determines the images of a set, as JSON values.

    Neither the count nor the batch size is part of it.

    Args:
      plan: a `config.Plan`.
      name: the name of the variables, such as step_0001755; a digest covers their values.
      tolerance: the tolerance, if a schedule is used; None for sequential sampling.
    """
    model, conditions = plan.model, plan.conditions
    approximate = {} if tolerance is None else {'tolerance': tolerance}
    return approximate | {
        'variables': {'name': name, 'digest': digest(variables)},
        'model': architecture(model) | {
            'dtype': jnp.dtype(model.dtype).name,
            'residual_dtype': jnp.dtype(model.block(0).stream_dtype).name,
            'precision': model.precision,
        },
        'guidance': dataclasses.asdict(plan.guidance),
        'denoise': plan.denoising and {
            **dataclasses.asdict(plan.denoising), 'levels': list(plan.denoising.levels)
        },
        'label': conditions.label if model.num_classes else -1,
        'noise_std': conditions.noise_std,
        'features': None if conditions.features is None else digest(conditions.features),
        'seed': seed,
    }


def folder_name(fingerprint: dict) -> str:
    """Returns the name of a set's folder, such as step_0001755-guidance_2.3-1f3a9c2e."""
    canonical = json.dumps(fingerprint, sort_keys=True, separators=(',', ':'))
    words = [fingerprint['variables']['name']]
    if fingerprint['guidance']['weight']:
        words.append(f'guidance_{fingerprint["guidance"]["weight"]:g}')
    return '-'.join([*words, hashlib.sha256(canonical.encode()).hexdigest()[:8]])


def digest(variables) -> str:
    """Returns 16 hexadecimal digits that change if any value of the variables changes.

    It sums integers, so the result does not depend on how the arrays are sharded.
    """
    sums = jax.tree.leaves(sums_of_hashes(variables))
    lines = [
        f'{jax.tree_util.keystr(path)} {leaf.shape} {total}'
        for (path, leaf), total in zip(jax.tree.leaves_with_path(variables), sums)
    ]
    return hashlib.sha256('\n'.join(lines).encode()).hexdigest()[:16]


def draw_set(
    folder,
    plan,
    variables,
    *,
    count: int,
    batch_size: int,
    seed: int,
    mesh,
    fingerprint: dict,
    file_format: str = 'npz',
    schedule: Schedule | None = None,
) -> dict:
    """Samples a set of images into a folder, or its missing part; the first process writes.

    The folder gets the images (see `sample_files`), `samples.json`, and PNG image grids of the
    first 1,000. An image that is not finite is sampled again with new noise, up to 10 times, and
    becomes grey if all attempts fail. A finished set is kept; a shorter one is extended.

    Args:
      plan: a `config.Plan` whose flow has the layout of `mesh`.
      count: minimum number of images in the set.
      batch_size: images per batch, rounded up to a multiple of the shards of the batch axis.
      fingerprint: the fingerprint of these arguments; see `fingerprint`.
      file_format: format of the images; see `sample_files`.
      schedule: schedule of the sampling methods; None for sequential sampling.
    Returns:
      the contents of `samples.json`, and 'drawn', 'seconds' and 'path': the number of images that
      this call sampled, its time, and the file.
    Raises:
      Stopped: after Ctrl-C or SIGTERM; finished batches are kept.
      ValueError: if the folder has a finished set with another fingerprint.
      Taken: if another process is sampling this set. Many processes may read a finished set.
    """
    folder = paths.of(folder)
    about = from_first(sample_files.read_about(folder))
    there = about and about['count'] >= count and about['format'] == file_format
    if there and from_first(sample_parts.are_left(folder)):
        # A finished set needs no lock, unless it is being extended.
        with contextlib.suppress(OSError), lock.held(folder, by_first):
            if jax.process_index() == 0:
                parts = sample_parts.parts(folder, plan.model.example_shape)
                sample_parts.remove(folder, parts, about['count'])
    with contextlib.nullcontext() if there else lock.held(folder, by_first):
        return _draw_set(
            folder, plan, variables, count, batch_size, seed, mesh, fingerprint, file_format,
            schedule,
        )


def _draw_set(
    folder, plan, variables, count, batch_size, seed, mesh, fingerprint, file_format, schedule
) -> dict:
    start, model = time.perf_counter(), plan.model
    writes = jax.process_index() == 0
    shape = model.example_shape
    batch_size = sharding.round_up(min(batch_size, count), mesh)
    about, stretches, todo = {'count': 0}, [], []
    if writes:
        about, stretches = sample_parts.finished(folder, fingerprint)
        stretches += sample_parts.parts(folder, shape)
        todo = sample_parts.missing(stretches, count, batch_size)
    todo = from_first(todo)
    missing = sum(last - first for first, last in todo)
    progress = _Progress(count, count - missing)
    draw = functools.partial(
        _draw, plan, variables, jax.random.key(seed), mesh, batch_size, schedule,
        progress.denoising,
    )
    with logging_redirect_tqdm(), progress, Stop() as stop:
        for i, (first, last) in enumerate(todo, 1):
            part = draw(np.arange(first, last))
            if writes:
                stretches.append(sample_parts.write(folder, first, part))
            progress.add(last - first)
            code = stop.after(i)
            if code is not None:
                log.warning('stopped; %d images are kept in %s; run the same command again to '
                            'resume', progress.done, folder)
                raise Stopped(code)
    if writes and (about['count'] < count or about['format'] != file_format):
        count = max(count, about['count'])
        _assemble(folder, stretches, plan.conditions, (count, *shape), about | {
            'fingerprint': fingerprint, 'count': count, 'format': file_format,
            'versions': versions(),
        })
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'samples in {folder.name}')
    about = sample_files.read_about(folder)
    return about | {
        'drawn': missing, 'seconds': time.perf_counter() - start,
        'path': str(sample_files.images_path(folder, about)),
    }


class _Progress:
    """Shows progress on the first process: a bar in a terminal, else a line at intervals."""

    def __init__(self, count: int, done: int):
        self.done = done
        self._count, self._start, self._since = count, done, time.perf_counter()
        self._logged = self._since
        self._bar = tqdm(
            total=count, initial=done, unit='image', desc='sampling',
            disable=done == count or jax.process_index() > 0 or not sys.stderr.isatty(),
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    @property
    def denoising(self) -> Callable[[int, int], None] | None:
        """Returns a callback that shows the denoising steps next to the bar, if there is a bar.

        Without a bar it returns None, because JAX's compilation cache skips programs with a
        callback. Several processes must compile the same program, but only the first has a bar.
        """
        return None if self._bar.disable or jax.process_count() > 1 else self._step

    def _step(self, done: int, steps: int) -> None:
        self._bar.set_postfix_str(f'denoising step {done} of {steps}')

    def add(self, images: int) -> None:
        self.done += images
        self._bar.update(images)
        now = time.perf_counter()
        if self._bar.disable and now - self._logged > LOG_SECONDS:
            rate = (self.done - self._start) / (now - self._since)
            left = tqdm.format_interval((self._count - self.done) / rate)
            log.info('%d of %d images, %.2f/s, %s left', self.done, self._count, rate, left)
            self._logged = now


# Sampling.


def _draw(plan, variables, key, mesh, batch_size, schedule, progress, numbers) -> dict:
    """Samples these images: 'pixels' uint8 [n, H, W, C], 'redraws' and 'finite' [n]."""
    model = plan.model

    def images(numbers, size: int, attempt: int) -> np.ndarray:
        """Samples images [n, H, W, C] in a batch of `size`."""
        numbers, given = np.resize(numbers, size), len(numbers)
        drawn = generate(
            model, variables, noise_of_examples(model, key, numbers, attempt),
            sharding.split(plan.conditions.of(numbers), mesh), guidance=plan.guidance,
            denoising=plan.denoising, schedule=schedule,
            denoising_key=keys_of_examples(jax.random.fold_in(key, 1), numbers, attempt),
            progress=progress,
        )
        return sharding.to_host(drawn.samples)[:given]

    drawn = np.array(images(numbers, batch_size, 0))
    redraws = np.zeros(len(numbers), np.int32)
    for attempt in range(1, MAX_REDRAWS + 1):
        failed = np.flatnonzero(~np.isfinite(drawn).all((1, 2, 3)))
        if not failed.size:
            break
        # Doubling the size keeps the number of compiled batch sizes small.
        size = sharding.batch_multiple(mesh)
        while size < failed.size:
            size *= 2
        drawn[failed] = images(numbers[failed], size, attempt)
        redraws[failed] += 1
    finite = np.isfinite(drawn).all((1, 2, 3))
    drawn[~finite] = 0.0
    return {'pixels': pictures.to_pixels(drawn), 'redraws': redraws, 'finite': finite}


# The result.


def _assemble(folder: Path, stretches, conditions, shape, about: dict) -> None:
    """Writes the finished set from the stretches, then removes their parts.

    `about` becomes `samples.json`; it has the totals of the images that were already finished.
    """
    path = sample_files.images_path(folder, about)
    pixels = sample_parts.in_order(stretches, shape[0], about)
    labels = conditions.labels(np.arange(shape[0]))
    if about['format'] == 'npz':
        sample_files.write_npz(path, pixels, shape, labels)
    else:
        names = conditions.class_names or [str(k) for k in range(conditions.num_classes)]
        sample_files.write_array_record(path, pixels, shape, labels, names)
    _write_sheets(folder, sample_files.open_samples(path), conditions)
    sealed = json_files.sealed(about)
    files.write_text(
        folder / sample_files.ABOUT, json.dumps(sealed, indent=2, sort_keys=True) + '\n'
    )
    if about['format'] == 'array_record':
        for shorter in set(folder.glob('array_record-*')) - {path}:
            paths.remove_tree(shorter)
    if about['not_finite']:
        log.warning('%d of %d images were not finite after %d attempts and are grey',
                    about['not_finite'], about['count'], MAX_REDRAWS)
    sample_parts.remove(folder, stretches, shape[0])


def _write_sheets(folder: Path, source, conditions) -> None:
    """Writes image grids of the first images, a hundred per grid."""
    count = min(len(source), SHEETS * PER_SHEET)
    for first in range(0, count, PER_SHEET):
        numbers = range(first, min(first + PER_SHEET, count))
        sheet = pictures.sheet(images_of(source, numbers), 10, conditions.captions(numbers))
        pictures.save_png(folder / f'sheet_{first:06d}.png', sheet)
