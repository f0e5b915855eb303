"""Trains a flow on arrays in memory, for use inside other programs."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tarflow_jax.flow import condition as conditions
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.likelihood import log_prob
from tarflow_jax.training.corruption import Recipe
from tarflow_jax.training.optimizer import adamw, learning_rate_schedule
from tarflow_jax.training.state import TrainState, initial_state
from tarflow_jax.training.step import update

Array = jax.Array
# (key, examples [B, ...], condition) -> (examples, condition)
Augment = Callable[[Array, Array, conditions.Condition], tuple[Array, conditions.Condition]]


class Fitted(NamedTuple):
    """What `fit` returns.

    Args:
      variables: of the flow. With held-out examples, those with the lowest held-out loss.
      losses: [steps] of the batches, -log p(x) in nats per example, float32.
      held_out_losses: one (step, mean of -log p(x) in nats per example) for each validation.
    """

    variables: Variables
    losses: np.ndarray
    held_out_losses: list[tuple[int, float]]


def fit(
    flow: Flow,
    examples: Array,
    condition=None,
    *,
    key: Array,
    steps: int,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    warmup_steps: int | None = None,
    weight_decay: float = 1e-4,
    clip_norm: float = 1.0,
    ema_decay: float = 0.999,
    dropout: float = 0.0,
    augment: Augment | None = None,
    held_out=None,
    validate_every: int = 500,
    patience: int | None = None,
    progress: Callable[[int, float], object] | None = None,
) -> Fitted:
    """Fits a flow to examples by maximum likelihood.

    AdamW with a warm-up and cosine decay, averaged parameters, batches without replacement within
    an epoch. Runs on the default device. `tarflow_jax.main` is for datasets on disk, checkpoints
    and meshes.

        fitted = tfj.fit(flow, x, tfj.Condition(features=y), key=jax.random.key(0), steps=5000)
        nats = tfj.log_prob(flow, fitted.variables, x_test, tfj.Condition(features=y_test))

    Args:
      flow: a `SequenceFlow` or `TarFlow`.
      examples: [N, T, D] or images [N, H, W, C], float32; about unit scale, see `Standardize`.
      condition: of each example: None, labels int32 [N], or a `Condition`.
      key: of the initial parameters, the batches, `augment` and `dropout`.
      steps: number of updates.
      batch_size: at most N.
      learning_rate: the peak; warmup_steps: None is a twentieth of `steps`.
      clip_norm: of the gradient; 0 never clips.
      ema_decay: of the averaged parameters; 0 keeps none.
      dropout: the probability that an example's class and features are dropped, which guidance
        needs.
      augment: called as augment(key, examples, condition) on each batch inside jit, and returns
        (examples, condition): noise, rotations and the like. The same function in a second call
        of `fit` spares it the compilation.
      held_out: examples, or a pair (examples, condition). Every `validate_every` steps their loss
        is computed, and the best parameters are kept. `augment` is not applied to them.
      patience: stop after this many validations without a better one; None never stops early.
      progress: called with (step, mean loss since the last call) every `validate_every` steps.
    Raises:
      ValueError: if the arguments do not fit each other.
      FloatingPointError: if the gradients of `validate_every` steps in a row are not finite.
    """
    for name, value in (
        ('steps', steps), ('batch_size', batch_size), ('validate_every', validate_every)
    ):
        if value < 1:
            raise ValueError(f'{name} {value} must be at least 1.')
    examples, condition = _checked(flow, examples, condition)
    if batch_size > examples.shape[0]:
        raise ValueError(
            f'batch_size {batch_size} is more than the {examples.shape[0]} examples; choose a '
            'smaller one.'
        )
    if held_out is not None:
        held_out = _checked(flow, *(held_out if isinstance(held_out, tuple) else (held_out, None)))
    elif patience is not None:
        raise ValueError(f'patience {patience} needs held_out examples; pass both or neither.')

    init_key, step_key, order_key = jax.random.split(key, 3)
    settings = _Settings(
        steps, steps // 20 if warmup_steps is None else warmup_steps, learning_rate, weight_decay,
        clip_norm, Recipe(ema_decay=ema_decay, label_dropout=dropout), augment,
    )
    state = _initial(init_key, flow, settings)
    losses: list[Array] = []
    validations: list[tuple[int, float]] = []
    best, lowest, best_variables, skipped = 0, math.inf, None, 0
    batches = _batches(order_key, examples.shape[0], batch_size)
    for k in range(1, steps + 1):
        state, loss = _step(
            state, step_key, next(batches), examples, condition, flow=flow, settings=settings
        )
        losses.append(loss)
        if k % validate_every and k != steps:
            continue
        recent = losses[(k - 1) // validate_every * validate_every:]
        before, skipped = skipped, int(state.skipped)
        if skipped - before == len(recent):
            raise FloatingPointError(
                f'the gradients of the last {len(recent)} steps, up to step {k}, are not finite; '
                'lower learning_rate, set scale_limit, or standardize the examples.'
            )
        if progress is not None:
            progress(k, float(_nats(flow, jnp.stack(recent)).mean()))
        if held_out is None:
            continue
        validations.append((k, _mean_loss(flow, state.variables(), *held_out, batch_size)))
        if validations[-1][1] < lowest:
            best, lowest = len(validations), validations[-1][1]
            # A copy, as the next step donates the state.
            best_variables = jax.tree.map(jnp.copy, state.variables())
        if patience is not None and len(validations) - best >= patience:
            break
    variables = state.variables() if best_variables is None else best_variables
    return Fitted(variables, np.asarray(_nats(flow, jnp.stack(losses))), validations)


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the step is compiled for; equal settings share a program."""

    steps: int
    warmup_steps: int
    learning_rate: float
    weight_decay: float
    clip_norm: float
    recipe: Recipe
    augment: Augment | None

    def optimizer(self) -> optax.GradientTransformation:
        schedule = learning_rate_schedule(
            peak=self.learning_rate, floor=0.0, warmup_steps=self.warmup_steps,
            total_steps=self.steps,
        )
        return adamw(schedule, weight_decay=self.weight_decay, clip_norm=self.clip_norm)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _initial(key: Array, flow: Flow, settings: _Settings) -> TrainState:
    ema = settings.recipe.ema_decay > 0
    return initial_state(key, flow, settings.optimizer(), ema=ema)


@functools.partial(jax.jit, static_argnames=('flow', 'settings'), donate_argnums=0)
def _step(
    state: TrainState, key: Array, index: Array, examples: Array, condition, *, flow: Flow,
    settings: _Settings,
) -> tuple[TrainState, Array]:
    """One update on the examples of `index` [B]; returns the next state and the loss."""
    augment_key, drop_key = jax.random.split(jax.random.fold_in(key, state.step))
    batch, given = examples[index], conditions.rows(condition, index)
    if settings.augment is not None:
        batch, given = settings.augment(augment_key, batch, given)
    if settings.recipe.label_dropout:
        dropped = jax.random.bernoulli(drop_key, settings.recipe.label_dropout, index.shape)
        given = conditions.drop(given, dropped)
    state, metrics = update(
        state, batch, given, model=flow, optimizer=settings.optimizer(), recipe=settings.recipe
    )
    return state, metrics['loss']


def _checked(flow: Flow, examples, condition) -> tuple[Array, conditions.Condition]:
    flow.check_examples(examples)
    examples = jnp.asarray(examples)
    condition = conditions.check_condition(flow, condition, examples.shape[0])
    return examples, conditions.per_example(condition, examples.shape[0])


def _batches(key: Array, count: int, batch_size: int) -> Iterator[np.ndarray]:
    """Yields indices of batches without end, each epoch in a new order, only whole batches."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def _nats(flow: Flow, losses: Array) -> Array:
    """-log p(x) in nats per example, from losses in nats per dimension without their constant."""
    return flow.num_dims * (losses + 0.5 * math.log(2 * math.pi))


def _mean_loss(flow: Flow, variables, examples, condition, batch_size: int) -> float:
    """The mean of -log p(x), nats per example."""
    total = 0.0
    for start in range(0, examples.shape[0], batch_size):
        part = np.arange(start, min(start + batch_size, examples.shape[0]))
        nats = log_prob(flow, variables, examples[part], conditions.rows(condition, part))
        total -= float(nats.sum())
    return total / examples.shape[0]
