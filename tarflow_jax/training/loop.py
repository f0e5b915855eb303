"""The training loop: batches, steps, metrics, validation, sample grids and checkpoints."""

import collections
import contextlib
import functools
import logging
import math

import jax
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tarflow_jax import paths
from tarflow_jax.config import Plan, Schedule
from tarflow_jax.data import pipeline
from tarflow_jax.training import pictures, sharding, validation
from tarflow_jax.training.checkpoint import Checkpoints
from tarflow_jax.training.metrics import MetricWriter, NoWriter, model_flops
from tarflow_jax.training.processes import Stop
from tarflow_jax.training.profiling import Profile
from tarflow_jax.training.progress import BAR, Clock, Lines, timed
from tarflow_jax.training.state import (
    abstract_state,
    all_finite,
    initial_state,
    parameter_count,
)
from tarflow_jax.training.step import jitted_train_step
from tarflow_jax.training.wandb_writer import WandbWriter

SHEET_COUNT = 100
NOTHING = contextlib.nullcontext()
STEPS_AHEAD = 4  # dispatched before the result of a step is read

log = logging.getLogger(__name__)
_all_finite = jax.jit(all_finite)


class Stopped(Exception):
    """The run was told to stop, and its state is saved; `code` is the exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Diverged(ArithmeticError):
    """Too many steps in a row were skipped, or the last step of the run was."""


def train(
    config, plan: Plan, schedule: Schedule, source, held_out, checkpoints: Checkpoints, workdir,
    mesh, profile_steps: range = range(0),
):
    """Trains to the end of the schedule, from the newest checkpoint if there is one.

    Args:
      config: a ConfigDict as `tarflow_jax.config.default` makes; plan, schedule: made from it.
      source: the training set, as `tarflow_jax.config.source` gives it; held_out: the test set, of
        which a part is for validation.
      workdir: gets `checkpoints/`, `metrics.jsonl`, `tensorboard/` and `samples/`.
      profile_steps: steps to trace for TensorBoard's profiler.
    Returns:
      the final `TrainState`.
    Raises:
      CheckpointError: if a checkpoint cannot be written.
      Stopped: after Ctrl-C or SIGTERM, when the state is saved.
      Diverged: if train.stop_after_skipped steps in a row were skipped, or the last step was.
    """
    t, model, workdir = config.train, plan.model, paths.of(workdir)
    init_key, step_key, sheet_key = jax.random.split(jax.random.key(config.seed), 3)
    clock = Clock(t.batch_size, model_flops(model))
    with clock.paused():
        state = _start(checkpoints, plan, schedule, init_key, mesh)
    start = int(state.step)
    told = f'steps {start + 1} to {schedule.total_steps}'
    if start == schedule.total_steps:
        told = f'all {start} steps are done'
    log.info('%s parameters, %s', f'{parameter_count(state):,}', told)

    step_fn = jitted_train_step(state, mesh, model, schedule.optimizer, plan.recipe)
    batches = pipeline.train_batches(
        source,
        batch_size=t.batch_size,
        seed=config.seed,
        flip=config.data.flip,
        start=start,
        rows=sharding.local_rows(mesh, t.batch_size),
        workers=config.data.workers,
    )
    validate = _Validation(config, plan, source, held_out, mesh)
    watch = _Watch(t.stop_after_skipped, state, checkpoints)
    due = False  # a checkpoint
    steps = range(start + 1, schedule.total_steps + 1)
    tell, sampled = Lines(schedule.total_steps), False
    first = jax.process_index() == 0
    with (
        contextlib.closing(batches),
        _writer(config, workdir, start) if first else NoWriter() as writer,
        contextlib.closing(Profile(profile_steps, workdir / 'tensorboard')) as profile,
        logging_redirect_tqdm(),
        tqdm(steps, initial=start, total=schedule.total_steps, bar_format=BAR,
             disable=None if first else True) as bar,
        Stop() as stop,
    ):
        for step in bar:
            with clock.waiting():
                batch = next(batches)
            batch = sharding.to_devices(batch, mesh, t.batch_size)
            compiles = step == start + 1
            with (
                profile.step(step),
                clock.paused() if compiles else NOTHING,
                timed('compiling the train step') if compiles else NOTHING,
            ):
                state, metrics = step_fn(state, batch, step_key)
            if compiles:
                clock.steady(step)
            profile.after(step, metrics)
            watch(step, metrics['skipped'])
            last = step == schedule.total_steps
            if step % t.log_every == 0 or last:
                metrics = jax.device_get(metrics)
                for b, square in enumerate(metrics.pop('block_mean_square')):
                    metrics[f'mean_square/block_{b}'] = square
                metrics['learning_rate'] = schedule.learning_rate(step - 1)
                metrics['epoch'] = step / schedule.steps_per_epoch
                metrics |= clock.speed(step)
                writer.write_scalars(step, metrics)
                told = tell(step, metrics, clock.left(step, schedule.total_steps))
                bar.set_postfix_str(told, refresh=False)
            if last:
                watch.check_end(state)
            if step % t.sample_every == 0 or last:
                with (
                    clock.paused(),
                    NOTHING if sampled else timed('compiling the sampler and drawing samples'),
                ):
                    _write_sheets(writer, plan, state, sheet_key, mesh, workdir, noise=not sampled)
                sampled = True
            due = due or step % t.checkpoint_every == 0 or last
            # The state of a skipped step is not known to be good: the next good step saves.
            saves = due and watch.is_good(state)
            validated = None
            if validate.is_due(step, saves):
                with clock.paused():
                    validated = validate(writer, state)
            if saves:
                with clock.paused():
                    writer.flush()
                    checkpoints.save(state, validated)
                due = False
            code = stop.after(step)
            if code is not None:
                if checkpoints.latest() != step and watch.is_good(state):
                    writer.flush()
                    checkpoints.save(state, validated)
                checkpoints.wait()
                log.warning(
                    'stopped after step %d, which %s; the same command resumes from %s', step,
                    *(('is saved', 'there') if watch.is_good(state) else
                      ('is not finite and not saved', watch.newest())),
                )
                raise Stopped(code)
    checkpoints.wait()
    best = checkpoints.best()
    if best is not None and best != checkpoints.latest():
        log.info('step %d has the lowest validation loss; --step=best chooses its checkpoint', best)
    return state


def _start(checkpoints: Checkpoints, plan: Plan, schedule: Schedule, key, mesh):
    """Restores the newest checkpoint, or initializes a new state."""
    ema = plan.recipe.ema_decay > 0
    describe = dict(model=plan.model, optimizer=schedule.optimizer, ema=ema)
    abstract = sharding.placed(abstract_state(**describe), mesh)
    if checkpoints.latest() is None:
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        initialize = jax.jit(functools.partial(initial_state, **describe), out_shardings=places)
        with timed('initializing the parameters'):
            return jax.block_until_ready(initialize(key))
    log.info('resuming from the checkpoint at step %d', checkpoints.latest())
    return checkpoints.restore(abstract)


def _writer(config, workdir, resume_step: int):
    writer = MetricWriter(workdir, resume_step=resume_step)
    project = config.train.wandb_project
    return WandbWriter(writer, project, workdir, config.to_dict()) if project else writer


def _write_sheets(writer, plan: Plan, state, key, mesh, workdir, noise: bool) -> None:
    """Draws samples and writes their image grids; the grid of their noise only if asked to.

    The noise is the same at every step.
    """
    step = int(state.step)
    sheets, redraws = pictures.sheets(plan, state.variables(), key, SHEET_COUNT, mesh)
    names = {name: f'step_{step:07d}_{name}.png' for name in sheets} | {'noise': 'noise.png'}
    if not noise:
        del sheets['noise']
    if jax.process_index() == 0:
        for name, sheet in sheets.items():
            pictures.save_png(workdir / 'samples' / names[name], sheet)
    writer.write_images(step, {f'samples/{name}': sheet for name, sheet in sheets.items()})
    writer.write_scalars(step, {'samples/redraws': redraws})
    if redraws:
        log.warning('step %d: %d samples were drawn again, as they were not finite', step, redraws)


class _Validation:
    """Validates a state, and writes what it finds."""

    def __init__(self, config, plan: Plan, source, held_out, mesh):
        t, sets = config.train, (held_out, source)
        same = dict(images=t.validation_images, seed=config.seed)
        self._every, self._told = t.validate_every, False
        self._validate = functools.partial(
            validation.validate, plan.model, plan.recipe, held_out=held_out, train=source,
            mesh=mesh, batch_size=config.evaluate.batch_size, **same,
        )
        self._of = validation.described(plan.recipe, *sets, **same)

    def is_due(self, step: int, saves: bool) -> bool:
        """Whether to validate after a step: every so many steps, and for every checkpoint."""
        return self._every > 0 and (saves or step % self._every == 0)

    def __call__(self, writer, state) -> dict | None:
        """Returns what to save beside the state; None if its loss is not finite."""
        step = int(state.step)
        with NOTHING if self._told else timed('compiling and running the validation'):
            found = self._validate(variables=state.variables())
        self._told = True
        writer.write_scalars(step, found)
        loss, bits, train_loss, train_bits = found.values()
        log.info(
            'step %d: validation loss %.5g, bits/dim %.5g; of training images %.5g, %.5g',
            step, loss, bits, train_loss, train_bits,
        )
        return {'loss': loss, 'of': self._of} if math.isfinite(loss) else None


class _Watch:
    """Raises Diverged when too many steps in a row were skipped.

    It reads the result of every step a few steps late, so that the devices never wait for it.

    A state is known to be good once a later step was not skipped: the gradient at its parameters
    was finite. So only the newest checkpoint can be bad, and it is if all later steps were skipped.
    """

    def __init__(self, limit: int, state, checkpoints: Checkpoints):
        self._limit, self._checkpoints = limit, checkpoints
        self._ahead = collections.deque()
        self._total = int(state.skipped)
        self._start = self._good = int(state.step)  # the last step that was not skipped
        self._step = self._start

    def __call__(self, step: int, skipped: jax.Array) -> None:
        self._ahead.append((step, skipped))
        if len(self._ahead) > STEPS_AHEAD:
            self._look()

    def is_good(self, state) -> bool:
        """Waits for the newest step; tells whether it was not skipped and its state is finite."""
        while self._ahead:
            self._look()
        return self._good == self._step and bool(_all_finite((state.variables(), state.params)))

    def check_end(self, state) -> None:
        """Waits for the newest step; raises Diverged if it was skipped or its state is bad."""
        if not self.is_good(state):
            self._diverged()

    def newest(self) -> str:
        """Names the newest checkpoint."""
        step = self._checkpoints.latest()
        return 'the beginning' if step is None else f'the checkpoint at step {step}'

    def _look(self) -> None:
        self._step, skipped = self._ahead.popleft()
        before, self._total = self._total, int(skipped)
        if self._total == before:
            self._good = self._step
            return
        if self._total & (self._total - 1) == 0:  # the 1st, 2nd, 4th, ...: a diverged run has many
            log.warning('skipped step %d, as its gradient was not finite (%d skipped so far)',
                        self._step, self._total)
        if self._step - self._good >= self._limit:
            self._diverged()

    def _diverged(self) -> None:
        self._checkpoints.wait()
        latest = self._checkpoints.latest()
        if latest == self._good > self._start:
            self._checkpoints.delete(latest)
            latest = self._checkpoints.latest()
        remedy = 'with a lower train.peak_learning_rate or train.clip_norm'
        if latest is None:
            remedy = f'no checkpoint holds a good state: start again {remedy}.'
        elif latest == self._good:
            remedy = (
                f'no step after the checkpoint at step {latest}, where this run began, was finite: '
                f'start again {remedy}, or delete {self._checkpoints.folder / str(latest)} if it '
                'is bad.'
            )
        else:
            remedy = (
                f'the checkpoint at step {latest} holds the last good state: resume from it '
                f'{remedy}.'
            )
        raise Diverged(
            f'the gradients or updates of {max(self._step - self._good, 1)} steps in a row, up to '
            f'{self._step}, were not finite; {remedy}'
        )
