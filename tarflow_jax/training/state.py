"""The train state, a plain pytree: how it starts, and its shapes and dtypes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tarflow_jax.flow.flow import Flow
from tarflow_jax.flow.transformer import OneDevice


class TrainState(NamedTuple):
    """All that training carries from step to step.

    Batch k is a pure function of k (data.pipeline), and every random key is folded from the seed
    and `step`. So `step` holds the position in both.
    """

    step: jax.Array
    params: Any
    ema_params: Any  # None without an exponential moving average
    opt_state: Any
    prior: Any  # {'variance': [T, D]} of volume-preserving flows, else None
    skipped: jax.Array  # steps so far whose gradient was not finite, and which changed nothing

    def variables(self) -> dict:
        """Returns what `model.apply` takes, with the averaged parameters if there are any."""
        return variables_of(self.params if self.ema_params is None else self.ema_params, self.prior)


def variables_of(params, prior) -> dict:
    return {'params': params} if prior is None else {'params': params, 'prior': prior}


def from_variables(variables, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """Makes the state at step 0 from the given variables."""
    params = variables['params']
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params) if ema else None,
        opt_state=optimizer.init(params),
        prior=variables.get('prior'),
        skipped=jnp.zeros((), jnp.int32),
    )


def initial_state(
    key: jax.Array, model: Flow, optimizer: optax.GradientTransformation, *, ema: bool
) -> TrainState:
    """Initializes the state before the first step. Runs under jit or `jax.eval_shape`."""
    shape = (1, *model.example_shape)
    # Lazily, so that the forward pass is neither computed nor compiled. On one device, as a batch
    # of one image cannot be sharded.
    model = model.clone(layout=OneDevice())
    variables = model.lazy_init(key, jax.ShapeDtypeStruct(shape, jnp.float32))
    return from_variables(variables, optimizer, ema=ema)


def abstract_state(model: Flow, optimizer: optax.GradientTransformation, *, ema: bool):
    """Returns the train state as `ShapeDtypeStruct` leaves; computes nothing."""
    def initial(key):
        return initial_state(key, model, optimizer, ema=ema)

    return jax.eval_shape(initial, jax.random.key(0))


def all_finite(tree) -> jax.Array:
    """Returns whether all numbers in a tree of arrays are finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def parameter_count(state: TrainState) -> int:
    """Counts the trained parameters, without averages and optimizer moments."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
