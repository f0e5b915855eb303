"""The decoding schedules of a workdir: the fastest sampling methods for each checkpoint."""

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
    """Reads a schedule if it matches these arguments and devices; else calibrates and writes one.

    Args:
      plan: a `config.Plan` whose flow has the layout of `mesh`.
      batch_size: images per batch, rounded up to a multiple of the shards of the batch axis.
    """
    path, model = paths.of(path), plan.model
    batch_size = sharding.round_up(batch_size, mesh)
    try:
        schedule = Schedule.load(path)
        schedule.check(model, plan.guidance)
        if (schedule.batch_size, schedule.tolerance) == (batch_size, tolerance):
            log.info('sampling with the schedule %s', path)
            return schedule
        log.info('%s is for batches of %s and tolerance %g; calibrating again', path,
                 schedule.batch_size, schedule.tolerance)
    except FileNotFoundError:
        log.info('calibrating the sampling of batches of %d, once; this takes some minutes',
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
            log.warning('the schedule cannot be cached: %s', error)
    log.info('%s:\n%s', path, '\n'.join(schedule.table()))
    return schedule
