"""The schedules of a workdir: how the samples of each checkpoint are drawn fastest."""

import logging
from pathlib import Path

import jax

from tarflow_jax.flow.calibration import calibrate
from tarflow_jax.flow.schedule import Schedule
from tarflow_jax.training import pictures, sharding

log = logging.getLogger(__name__)


def schedule_of(
    path, plan, variables, *, batch_size: int, label: int, tolerance: float, mesh
) -> Schedule:
    """The schedule in a file if it is for these arguments and devices; else calibrates and writes.

    Args:
      plan: a `config.Plan`; its flow is laid out over `mesh`.
      batch_size: rounded up to a multiple of what the mesh splits a batch into.
      label: of all images; -1 goes through the classes.
    """
    path, model = Path(path), plan.model
    batch_size = sharding.round_up(batch_size, mesh)
    try:
        schedule = Schedule.load(path)
        schedule.check(model, plan.guidance)
        if (schedule.batch_size, schedule.tolerance) == (batch_size, tolerance):
            log.info('samples are drawn by the schedule %s', path)
            return schedule
        log.info('%s is for batches of %s and tolerance %g; calibrating again', path,
                 schedule.batch_size, schedule.tolerance)
    except FileNotFoundError:
        log.info('finding the fastest way to draw batches of %d, which takes some minutes, once',
                 batch_size)
    except ValueError as error:
        log.info('%s: %s', path, error)
    labels = pictures.class_labels(model, batch_size, label)
    if labels is not None:
        labels = jax.make_array_from_callback(
            (batch_size,), sharding.batch_sharding(mesh), labels.__getitem__
        )
    schedule = calibrate(
        model, variables, labels, batch_size=batch_size, guidance=plan.guidance,
        tolerance=tolerance,
    )
    if jax.process_index() == 0:
        schedule.save(path)
    log.info('%s:\n%s', path, '\n'.join(schedule.table()))
    return schedule
