"""The training loop: data in, steps, and on their way metrics, pictures and checkpoints."""

import contextlib
import functools
import logging
import math
import signal
import threading
import time
from pathlib import Path

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tarflow_jax.config import Plan, Schedule
from tarflow_jax.data import pipeline
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.checkpoint import Checkpoints, with_sharding
from tarflow_jax.training.metrics import MetricWriter, model_flops
from tarflow_jax.training.state import abstract_state, initial_state, parameter_count
from tarflow_jax.training.step import train_step

SHEET_COUNT = 100

log = logging.getLogger(__name__)


def train(config, plan: Plan, schedule: Schedule, source, checkpoints: Checkpoints, workdir, mesh):
    """Trains to the end of the schedule, from the newest checkpoint if there is one.

    Args:
      config: a ConfigDict as `tarflow_jax.config.default` makes; plan, schedule: made from it.
      source: the training set, as `tarflow_jax.config.source` gives it.
      workdir: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/`.
    Returns:
      the final `TrainState`.
    Raises:
      CheckpointError: if a checkpoint cannot be written.
      KeyboardInterrupt: after the state is saved.
    """
    t, model, workdir = config.train, plan.model, Path(workdir)
    init_key, step_key, sheet_key = jax.random.split(jax.random.key(config.seed), 3)
    state = _start(checkpoints, plan, schedule, init_key, mesh)
    start = int(state.step)
    log.info('%s parameters, steps %d to %d', f'{parameter_count(state):,}', start + 1,
             schedule.total_steps)

    step_fn = jax.jit(
        functools.partial(
            train_step, model=model, optimizer=schedule.optimizer, recipe=plan.recipe
        ),
        donate_argnums=0,
    )
    batches = pipeline.train_batches(
        source,
        batch_size=t.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        start=start,
        workers=config.data.workers,
    )
    clock = _Clock(t.batch_size, model_flops(model))
    steps = range(start + 1, schedule.total_steps + 1)
    with (
        contextlib.closing(batches),
        MetricWriter(workdir, resume_step=start) as writer,
        logging_redirect_tqdm(),
        tqdm(steps, initial=start, total=schedule.total_steps, unit='step', disable=None) as bar,
        _ctrl_c() as pressed,
    ):
        for step in bar:
            batch = sharding.to_devices(next(batches), mesh)
            state, metrics = step_fn(state, batch, step_key)
            last = step == schedule.total_steps
            if step % t.log_every == 0 or last:
                metrics = jax.device_get(metrics)
                for b, square in enumerate(metrics.pop('block_mean_square')):
                    metrics[f'mean_square/block_{b}'] = square
                metrics['learning_rate'] = schedule.learning_rate(step - 1)
                metrics['epoch'] = step / schedule.steps_per_epoch
                writer.write_scalars(step, metrics | clock.speed(step))
                if not math.isfinite(metrics['loss']):
                    log.warning('the loss at step %d is not finite', step)
            if step % t.sample_every == 0 or last:
                with clock.paused():
                    _write_sheets(writer, plan, state, sheet_key, mesh, config, workdir)
            if step % t.checkpoint_every == 0 or last:
                with clock.paused():
                    writer.flush()
                    checkpoints.save(state)
            if pressed:
                if checkpoints.latest() != step:
                    writer.flush()
                    checkpoints.save(state)
                checkpoints.wait()
                log.warning('stopped after step %d, which is saved; the same command goes on '
                            'from there', step)
                raise KeyboardInterrupt
    checkpoints.wait()
    return state


def _start(checkpoints: Checkpoints, plan: Plan, schedule: Schedule, key, mesh):
    """The state to begin with: the newest checkpoint's, or a new one."""
    ema = plan.recipe.ema_decay > 0
    describe = dict(model=plan.model, optimizer=schedule.optimizer, ema=ema)
    everywhere = sharding.replicated(mesh)
    if checkpoints.latest() is None:
        return jax.jit(functools.partial(initial_state, **describe), out_shardings=everywhere)(key)
    log.info('continuing from the checkpoint at step %d', checkpoints.latest())
    return checkpoints.restore(with_sharding(abstract_state(**describe), everywhere))


def _write_sheets(writer, plan: Plan, state, key, mesh, config, workdir: Path) -> None:
    step = int(state.step)
    labels = pictures.class_labels(plan.model, SHEET_COUNT, config.sample.label)
    sheets, redraws = pictures.sheets(
        plan, state.variables(), key, labels, SHEET_COUNT, mesh, config.sample.denoise_strength
    )
    for name, sheet in sheets.items():
        pictures.save_png(workdir / 'samples' / f'step_{step:07d}_{name}.png', sheet, scale=2)
    writer.write_images(step, {f'samples/{name}': sheet for name, sheet in sheets.items()})
    writer.write_scalars(step, {'samples/redraws': redraws})


@contextlib.contextmanager
def _ctrl_c():
    """A list that the first Ctrl-C fills, for the loop to look at between steps.

    Raised inside of one it could lose the state: its buffers are given to a step before the step
    returns the next ones. A second Ctrl-C raises at once, and nothing is saved.
    """
    pressed = []
    before = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if before is not signal.default_int_handler or not in_main_thread:
        yield pressed  # ignored by nohup and the like, or not this function's to handle
        return

    def handle(*_):
        pressed.append(True)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class _Clock:
    """Images and model FLOPs per second since the last reading, pauses left out."""

    def __init__(self, batch_size: int, flops_per_image: float):
        self._batch_size, self._flops = batch_size, flops_per_image
        self._since = self._step = None

    def speed(self, step: int) -> dict[str, float]:
        now, since, before = time.perf_counter(), self._since, self._step
        self._since, self._step = now, step
        if since is None:  # the first reading would measure the compiler
            return {}
        rate = (step - before) * self._batch_size / (now - since)
        return {'images_per_second': rate, 'model_flops_per_second': rate * self._flops}

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start
