"""Whether a run can do what its config asks: memory, disk, workers, and what was there before."""

import logging
import shutil
from pathlib import Path

from tarflow_jax import class_order, config_of_run, paths
from tarflow_jax import config as configs
from tarflow_jax.data import pipeline
from tarflow_jax.training import memory, sharding
from tarflow_jax.training.checkpoint import Checkpoints

# What a run keeps in its workdir.
FOLDERS = ('checkpoints', 'compiled', 'samples', 'schedules', 'statistics', 'tensorboard')
FILES = ('metrics.jsonl', 'evaluation.json', 'report.html', 'report.json', 'outliers.png')

log = logging.getLogger(__name__)


def workdir(given: str) -> Path:
    """The workdir; ValueError if it cannot be written to, or something else has a name it needs."""
    folder = paths.writable_folder(given, f'--workdir={given}')
    for names, wrong, kind in ((FOLDERS, 'is_file', 'folder'), (FILES, 'is_dir', 'file')):
        for path in (folder / name for name in names):
            if getattr(path, wrong)():
                raise ValueError(
                    f'{path} is no {kind}, and the run needs a {kind} of this name; move it away.'
                )
    return folder


def training(config, plan, mesh) -> str:
    """The memory that a train step needs; ValueError if the devices are too small for it."""
    t = config.train
    needed = memory.of_training(
        plan.model, mesh, t.batch_size, ema=t.ema_decay > 0, accumulation=t.accumulation
    )
    return memory.check(needed, plan.model, mesh, f'training (train.batch_size {t.batch_size})')


def batches(config, mesh, source) -> None:
    """ValueError unless the batches of training can be split and read as the config says."""
    t = config.train
    sharding.check(mesh, t.batch_size, 'train.batch_size', t.accumulation)
    rows = len(sharding.local_rows(mesh, t.batch_size))
    configs.named('data', pipeline.check_workers, source, rows, config.data.workers)


def sample_set(config, plan, mesh, folder: Path, always: bool = False) -> str:
    """The memory that config.sample needs; ValueError if it, or the disk, is too small for it."""
    s, model = config.sample, plan.model
    if not always and ('frechet' not in config.evaluate.metrics or config.evaluate.frechet.samples):
        return ''
    batch_size = min(s.batch_size, s.count)
    needed = memory.of_sampling(model, mesh, batch_size)
    told = memory.check(needed, model, mesh, f'sampling (sample.batch_size {batch_size})')
    _check_disk(folder, s.count * model.num_dims, f'the images of sample.count {s.count}')
    return told


def _check_disk(folder: Path, size: int, what: str) -> None:
    """ValueError if so many bytes are more than the whole file system of a folder holds."""
    if paths.in_bucket(folder):
        return
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    total = shutil.disk_usage(there).total
    if size > total:
        raise ValueError(
            f'{what} need {size / 1e9:,.0f} GB, and the file system of {there} has '
            f'{total / 1e9:,.0f} GB; choose fewer.'
        )


def scoring(config, plan, mesh, source) -> str:
    """The memory that likelihoods of a set need; ValueError if the devices are too small for it."""
    batch_size = min(config.evaluate.batch_size, len(source))
    needed = memory.of_scoring(plan.model, mesh, batch_size)
    return memory.check(needed, plan.model, mesh, f'scoring (evaluate.batch_size {batch_size})')


def same_run(checkpoints: Checkpoints, config, schedule, classes, name: str) -> None:
    """Says what is not as it was in a run that goes on; ValueError where it cannot go on so."""
    about, latest = checkpoints.about(), checkpoints.latest()
    there, here = about['config'].get('train', {}).get('ema_decay'), config.train.ema_decay
    if there is not None and (there > 0) != (here > 0):
        raise ValueError(
            f'{checkpoints.folder} holds a checkpoint with train.ema_decay {there}, this config '
            f'has {here}; an average can be neither begun nor dropped on the way.'
        )
    if latest > schedule.total_steps:
        raise ValueError(
            f'train.epochs {config.train.epochs:g} are {schedule.total_steps} steps, and '
            f'{checkpoints.folder} holds a checkpoint at step {latest}; give more epochs than '
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
        log.warning('not as in the checkpoint at step %d: %s', latest, told)


def set_name(source) -> str:
    name, split = source.about.get('dataset', 'images'), source.about.get('split')
    return f'{name}, {len(source):,} images' + (f' of split {split!r}' if split else '')


def classes_of(checkpoints: Checkpoints) -> class_order.Classes:
    data = checkpoints.about().get('data', {})
    return class_order.Classes(data.get('class_names'), data.get('kind'))
