"""Finds by measurement how each block of a flow is inverted fastest on the devices at hand."""

import dataclasses
import functools
import logging
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition, batch_size_of, check_condition, labels_keyword
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.likelihood import prior_variance
from tarflow_jax.sampling.noise import standard_noise
from tarflow_jax.sampling.schedule import (
    TOLERANCE,
    BlockSchedule,
    Schedule,
    made_for,
    run_block,
)

SEGMENTS = (1, 2, 4, 8, 16, 32)
SHORTEST_WINDOW = 8
# Parallel decoding must save this much of the sequential time to be worth its error.
WORTH_IT, CLEARLY_SLOWER = 0.95, 1.3
# Images of the calibration stay this far below the tolerance, so that others stay below it.
MARGIN = 0.25
# About what bfloat16 makes of numbers near 1: iterates differ by this until they are exact.
BFLOAT16_TOLERANCE = 0.01
REPEATS = 3

log = logging.getLogger(__name__)


@labels_keyword
def calibrate(
    model: Flow,
    variables: Variables,
    condition: Condition | Array | None = None,
    *,
    batch_size: int = 16,
    guidance: Guidance | None = None,
    tolerance: float = TOLERANCE,
    key: Array | None = None,
) -> Schedule:
    """A schedule that minimises the time of sampling under a tolerance.

    Draws one batch sequentially, then inverts every block on what sequential sampling gives it, by
    Jacobi and Gauss-Seidel-Jacobi iteration with ever more segments, and takes what was fastest.
    An error of one block grows in those after it by a factor that only the flow knows. So the whole
    batch is then drawn by the schedule, and the blocks' tolerances are lowered until its images
    differ from the sequential ones by less than a quarter of the tolerance; of a bfloat16 flow, by
    less than that or than the sequential ones in float32 do.

    Takes the time of some ten batches, and of compiling: a dozen programs for each depth of block.

    Args:
      condition: of the batch, as for `sample`; it decides the batch size, if it has arrays.
      batch_size: should be that of the sampling to come: it decides what is fastest.
      guidance: that of the sampling to come.
      tolerance: largest error of an image, in units of the [-1, 1] range.
      key: of the noise.
    Raises:
      ValueError: if the arguments do not fit the model or each other.
    """
    if not tolerance > 0:
        raise ValueError(f'tolerance {tolerance} must be above 0.')
    batch_size = batch_size_of(condition) or batch_size
    condition = check_condition(model, condition, batch_size)
    if guidance is not None:
        guidance.check(model, condition)
    key = jax.random.key(0) if key is None else key
    length, calls = model.token_shape[0], model.block(0).calls
    start = standard_noise(model, key, batch_size) * jnp.sqrt(prior_variance(variables))

    def run(index, how, x):
        return run_block(model, variables, index, how, x, condition, guidance)

    blocks, x = {}, start
    for b in reversed(range(len(model.layers_per_block))):
        blocks[b], x = _fastest(lambda how, b=b, x=x: run(b, how, x), length, tolerance)
    made = functools.partial(
        Schedule, tolerance=tolerance, made_for=made_for(model, guidance), batch_size=batch_size
    )
    if not _finite(x).any():
        log.warning('no image of the calibration is finite: all blocks are left sequential.')
        return made((BlockSchedule(calls=calls),) * len(blocks))

    wanted, factor, error, lowest = x, 1.0, 0.0, MARGIN * tolerance
    if jnp.dtype(model.dtype) == jnp.bfloat16:
        if tolerance < BFLOAT16_TOLERANCE:
            log.warning(
                'tolerance %g is less than bfloat16 rounds by, so that parallel decoding ends when '
                'it is exact and takes long; ask for %g, or sample in float32.',
                tolerance, BFLOAT16_TOLERANCE,
            )
        wide, x = model.clone(dtype=jnp.float32), start
        for b in blocks:
            # Caches as they are: twice as large they might not fit.
            x = run_block(
                wide, variables, b, BlockSchedule(), x, condition, guidance,
                cache_dtype=model.dtype,
            ).x
        lowest = max(lowest, float(_largest_difference(x, wanted)))
    for _ in range(4):
        tried, x = {}, start
        for b, how in blocks.items():
            how = dataclasses.replace(how, tolerance=factor * how.tolerance)
            solution = run(b, how, x)
            x = solution.x
            tried[b] = dataclasses.replace(how, calls=int(solution.calls))
        before, error = error, float(_largest_difference(x, wanted))
        if error <= lowest or (before and error > before / 2):
            break  # or else it is rounding, which no tolerance lowers
        factor *= max(0.3 * lowest / error, 0.01)
    blocks = {b: _limited(how, length) for b, how in tried.items()}
    # Times once more, with the tolerances as they are now.
    x = start
    for b, how in blocks.items():
        functions = [lambda h=h, x=x, b=b: run(b, h, x) for h in (how, BlockSchedule())]
        seconds, sequential_seconds = _seconds(functions)
        blocks[b] = _decided(how, seconds, sequential_seconds, calls)
        x = run(b, blocks[b], x).x
    return made(tuple(blocks[b] for b in sorted(blocks)), error=error)


def _fastest(run, length: int, tolerance: float) -> tuple[BlockSchedule, Array]:
    """The fastest way to invert a block, and its output; `run` takes a BlockSchedule."""
    sequential = BlockSchedule(tolerance=tolerance)
    output = run(sequential).x
    best, best_seconds, worse = sequential, np.inf, 0
    for segments in SEGMENTS:
        if segments > 1 and length // segments < SHORTEST_WINDOW:
            break
        how = BlockSchedule(segments, tolerance)
        run(how)  # compiles
        seconds, sequential_seconds = _seconds([lambda h=h: run(h) for h in (how, sequential)])
        if seconds < best_seconds:
            best, best_seconds, worse = how, seconds, 0
        else:
            worse += 1
        if worse == 2:  # the time has one minimum: more calls of fewer positions each
            break
    if best_seconds > CLEARLY_SLOWER * sequential_seconds:
        best = sequential
    return best, output


def _limited(how: BlockSchedule, length: int) -> BlockSchedule:
    """With a limit to what an unlucky batch may cost."""
    if not how.segments or how.calls is None:
        return how
    return dataclasses.replace(how, max_iterations=min(2 * how.calls + 4, length))


def _decided(how, seconds, sequential_seconds, calls: int) -> BlockSchedule:
    if seconds > WORTH_IT * sequential_seconds:
        how, seconds = BlockSchedule(calls=calls), sequential_seconds
    return dataclasses.replace(how, seconds=seconds, sequential_seconds=sequential_seconds)


def _seconds(functions) -> list[float]:
    """The least time of each, called in turn; the first process decides for all."""
    least = [np.inf] * len(functions)
    for _ in range(REPEATS):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            jax.block_until_ready(function())
            least[i] = min(least[i], time.perf_counter() - start)
    if jax.process_count() > 1:
        least = multihost_utils.broadcast_one_to_all(np.array(least)).tolist()
    return least


@jax.jit
def _finite(x):
    return jnp.isfinite(x).all((1, 2))


@jax.jit
def _largest_difference(x, wanted):
    # Images that overflow are drawn again, however they were drawn.
    return jnp.where(_finite(wanted)[:, None, None], abs(x - wanted), 0.0).max()


# Schedules of `sample(method='auto')` without one, each with a reference to its variables.
_REMEMBERED: list[tuple[weakref.ref, tuple, Schedule]] = []


def calibrated(model, variables, condition, batch_size, guidance, tolerance) -> Schedule:
    """The schedule of an earlier call with the same arguments, or of `calibrate` now."""
    leaf = jax.tree.leaves(variables)[0]
    what = (model, batch_size, jax.tree.structure(condition), guidance, tolerance)
    _REMEMBERED[:] = [entry for entry in _REMEMBERED if entry[0]() is not None]
    for reference, known, schedule in _REMEMBERED:
        if reference() is leaf and known == what:
            return schedule
    schedule = calibrate(
        model, variables, condition, batch_size=batch_size, guidance=guidance, tolerance=tolerance
    )
    log.info('calibrated:\n%s', '\n'.join(schedule.table()))
    _REMEMBERED.append((weakref.ref(leaf), what, schedule))
    return schedule
