"""Checks before a run: memory, disk, workers, and the existing workdir."""

import logging
import shutil
from pathlib import Path

from tarflow_jax import class_order, config_of_run, paths
from tarflow_jax import config as configs
from tarflow_jax.data import pipeline
from tarflow_jax.training import memory, sharding
from tarflow_jax.training.checkpoint import Checkpoints

# The files and folders of a workdir.
FOLDERS = ('checkpoints', 'compiled', 'samples', 'schedules', 'statistics', 'tensorboard')
FILES = ('metrics.jsonl', 'evaluation.json', 'report.html', 'report.json', 'outliers.png')

log = logging.getLogger(__name__)


def workdir(given: str) -> Path:
    """Returns the workdir; raises ValueError if it is not writable or a name in it is taken."""
    folder = paths.writable_folder(given, f'--workdir={given}')
    for names, wrong, kind in ((FOLDERS, 'is_file', 'folder'), (FILES, 'is_dir', 'file')):
        for path in (folder / name for name in names):
            if getattr(path, wrong)():
                raise ValueError(
                    f'{path} is not a {kind}, but the run needs a {kind} of this name; move it.'
                )
    return folder


def training(config, plan, mesh) -> str:
    """Describes the memory of a train step; raises ValueError if the devices are too small."""
    t = config.train
    needed = memory.of_training(
        plan.model, mesh, t.batch_size, ema=t.ema_decay > 0, accumulation=t.accumulation
    )
    return memory.check(needed, plan.model, mesh, f'training (train.batch_size {t.batch_size})')


def batches(config, mesh, source) -> None:
    """Raises ValueError unless training batches can be sharded and read as the config says."""
    t = config.train
    sharding.check(mesh, t.batch_size, 'train.batch_size', t.accumulation)
    rows = len(sharding.local_rows(mesh, t.batch_size))
    configs.named('data', pipeline.check_workers, source, rows, config.data.workers)


def sample_set(config, plan, mesh, folder: Path, always: bool = False) -> str:
    """Describes the memory of sampling; raises ValueError if memory or disk are too small."""
    s, model = config.sample, plan.model
    if not always and ('frechet' not in config.evaluate.metrics or config.evaluate.frechet.samples):
        return ''
    batch_size = min(s.batch_size, s.count)
    needed = memory.of_sampling(model, mesh, batch_size)
    told = memory.check(needed, model, mesh, f'sampling (sample.batch_size {batch_size})')
    _check_disk(folder, s.count * model.num_dims, f'the images of sample.count {s.count}')
    return told


def _check_disk(folder: Path, size: int, what: str) -> None:
    """Raises ValueError if `size` bytes exceed the whole file system of a folder."""
    if paths.in_bucket(folder):
        return
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    total = shutil.disk_usage(there).total
    if size > total:
        raise ValueError(
            f'{what} need {size / 1e9:,.0f} GB, but the file system of {there} has '
            f'{total / 1e9:,.0f} GB; choose fewer.'
        )


def scoring(config, plan, mesh, source) -> str:
    """Describes the memory of likelihoods; raises ValueError if the devices are too small."""
    batch_size = min(config.evaluate.batch_size, len(source))
    needed = memory.of_scoring(plan.model, mesh, batch_size)
    return memory.check(needed, plan.model, mesh, f'scoring (evaluate.batch_size {batch_size})')


def same_run(checkpoints: Checkpoints, config, schedule, classes, name: str) -> None:
    """Logs what changed in a resumed run; raises ValueError if it cannot resume with that."""
    about, latest = checkpoints.about(), checkpoints.latest()
    there, here = about['config'].get('train', {}).get('ema_decay'), config.train.ema_decay
    if there is not None and (there > 0) != (here > 0):
        raise ValueError(
            f'{checkpoints.folder} has a checkpoint with train.ema_decay {there}, but this config '
            f'has {here}; averaging cannot be turned on or off in a resumed run.'
        )
    if latest > schedule.total_steps:
        raise ValueError(
            f'train.epochs {config.train.epochs:g} is {schedule.total_steps} steps, but '
            f'{checkpoints.folder} has a checkpoint at step {latest}; set more epochs than '
            f'{latest / schedule.steps_per_epoch:g}, or another --workdir.'
        )
    if config.model.num_classes:
        class_order.check_same(classes_of(checkpoints), classes, str(checkpoints.folder))
    changes = config_of_run.differences(about['config'], config)
    before = about.get('data', {}).get('set', name)
    told = config_of_run.told(changes) + (', ' if changes and before != name else '')
    if before != name:
        told += f'training set {name} instead of {before}'
    if told:
        log.warning('changed since the checkpoint at step %d: %s', latest, told)


def set_name(source) -> str:
    name, split = source.about.get('dataset', 'images'), source.about.get('split')
    return f'{name}, {len(source):,} images' + (f' of split {split!r}' if split else '')


def classes_of(checkpoints: Checkpoints) -> class_order.Classes:
    data = checkpoints.about().get('data', {})
    return class_order.Classes(data.get('class_names'), data.get('kind'))
