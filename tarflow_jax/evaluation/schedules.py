"""The schedules of a workdir: how the samples of each checkpoint are drawn fastest."""

import logging

import jax
import numpy as np

from tarflow_jax import paths
from tarflow_jax.sampling.calibration import calibrate
from tarflow_jax.sampling.schedule import Schedule
from tarflow_jax.training import sharding

log = logging.getLogger(__name__)


def schedule_of(
    path, plan, variables, *, batch_size: int, tolerance: float, mesh
) -> Schedule:
    """The schedule in a file if it is for these arguments and devices; else calibrates and writes.

    Args:
      plan: a `config.Plan`; its flow is laid out over `mesh`.
      batch_size: rounded up to a multiple of what the mesh splits a batch into.
    """
    path, model = paths.of(path), plan.model
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
    condition = sharding.split(plan.conditions.of(np.arange(batch_size)), mesh)
    schedule = calibrate(
        model, variables, condition, batch_size=batch_size, guidance=plan.guidance,
        tolerance=tolerance,
    )
    if jax.process_index() == 0:
        try:
            schedule.save(path)
        except OSError as error:
            log.warning('the schedule is not kept for the next time: %s', error)
    log.info('%s:\n%s', path, '\n'.join(schedule.table()))
    return schedule
