"""Calibration: measures which method inverts each block fastest on these devices."""

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
# Shares of the sequential time. Parallel decoding must stay below the first to be worth its error;
# above the second, it is dropped before the last timing.
WORTH_IT, CLEARLY_SLOWER = 0.95, 1.3
# Samples of the calibration may have this share of the tolerance as error, so that later samples
# stay below the tolerance.
MARGIN = 0.25
# About the rounding error of bfloat16 near 1, by which iterates change until they are exact.
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
    """Finds the schedule that samples fastest within a tolerance.

    First, draws one batch sequentially and times each block on its input in this batch: by
    sequential decoding, by Jacobi iteration, and by Gauss-Seidel-Jacobi iteration with more and
    more segments. The fastest is taken.

    Later blocks amplify the error of a block by an unknown factor. So the batch is drawn by the
    schedule, and the tolerances of the blocks are lowered until the samples differ from sequential
    ones by less than a quarter of `tolerance`. For a bfloat16 flow, the difference between its
    sequential samples and those in float32 is also accepted.

    It takes about as long as ten batches, and compiles a dozen programs for each depth of block.

    Args:
      condition: of the batch, as for `sample`. Its arrays, if any, decide the batch size.
      batch_size, guidance: of the sampling to come; they decide which method is fastest.
      tolerance: largest error of a sample, in units of the [-1, 1] range of images.
      key: of the noise; None is a fixed key.
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
        log.warning('no sample of the calibration is finite, so all blocks stay sequential.')
        return made((BlockSchedule(calls=calls),) * len(blocks))

    wanted, factor, error, lowest = x, 1.0, 0.0, MARGIN * tolerance
    if jnp.dtype(model.dtype) == jnp.bfloat16:
        if tolerance < BFLOAT16_TOLERANCE:
            log.warning(
                'tolerance %g is below the rounding error of bfloat16, so parallel decoding ends '
                'only when it is exact, which takes long; choose %g, or sample in float32.',
                tolerance, BFLOAT16_TOLERANCE,
            )
        wide, x = model.clone(dtype=jnp.float32), start
        for b in blocks:
            # Caches in float32 would be twice as large, and might not fit.
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
            break  # small enough, or rounding, which a lower tolerance does not lower
        factor *= max(0.3 * lowest / error, 0.01)
    blocks = {b: _limited(how, length) for b, how in tried.items()}
    # Times the blocks again with their final tolerances.
    x = start
    for b, how in blocks.items():
        functions = [lambda h=h, x=x, b=b: run(b, h, x) for h in (how, BlockSchedule())]
        seconds, sequential_seconds = _seconds(functions)
        blocks[b] = _decided(how, seconds, sequential_seconds, calls)
        x = run(b, blocks[b], x).x
    return made(tuple(blocks[b] for b in sorted(blocks)), error=error)


def _fastest(run, length: int, tolerance: float) -> tuple[BlockSchedule, Array]:
    """Finds the fastest way to invert a block; `run` takes a BlockSchedule.

    Returns:
      (how, the output of sequential decoding).
    """
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
        if worse == 2:  # more segments mean more calls: past its minimum, the time only grows
            break
    if best_seconds > CLEARLY_SLOWER * sequential_seconds:
        best = sequential
    return best, output


def _limited(how: BlockSchedule, length: int) -> BlockSchedule:
    """Limits the iterations, and so the cost of a batch that converges slowly."""
    if not how.segments or how.calls is None:
        return how
    return dataclasses.replace(how, max_iterations=min(2 * how.calls + 4, length))


def _decided(how, seconds, sequential_seconds, calls: int) -> BlockSchedule:
    if seconds > WORTH_IT * sequential_seconds:
        how, seconds = BlockSchedule(calls=calls), sequential_seconds
    return dataclasses.replace(how, seconds=seconds, sequential_seconds=sequential_seconds)


def _seconds(functions) -> list[float]:
    """Measures the shortest time of each function; the first process decides for all."""
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
    # Samples that overflow do not count: every method draws them again.
    return jnp.where(_finite(wanted)[:, None, None], abs(x - wanted), 0.0).max()


# Schedules that `sample(method='auto')` made, each with a reference to its variables.
_REMEMBERED: list[tuple[weakref.ref, tuple, Schedule]] = []


def calibrated(model, variables, condition, batch_size, guidance, tolerance) -> Schedule:
    """Returns the schedule of an earlier call with the same arguments, or calibrates."""
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
