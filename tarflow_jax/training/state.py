"""The train state, a plain pytree, and its one description: shapes, dtypes and shardings."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tarflow_jax.flow.flow import Flow
from tarflow_jax.flow.transformer import OneDevice


class TrainState(NamedTuple):
    """All that training carries from step to step.

    The position in the data is `step` itself: batch k is a pure function of k (data.pipeline).
    Randomness is too: every key is folded from the seed and `step`.
    """

    step: jax.Array
    params: Any
    ema_params: Any  # None without an exponential moving average
    opt_state: Any
    prior: Any  # {'variance': [T, D]} of volume-preserving flows, else None
    skipped: jax.Array  # steps so far whose gradient was not finite, which changed nothing else

    def variables(self) -> dict:
        """What `model.apply` takes, with the averaged parameters where there are any."""
        return variables_of(self.params if self.ema_params is None else self.ema_params, self.prior)


def variables_of(params, prior) -> dict:
    return {'params': params} if prior is None else {'params': params, 'prior': prior}


def from_variables(variables, optimizer: optax.GradientTransformation, *, ema: bool) -> TrainState:
    """A state at step 0 that starts from the given variables."""
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
    """The state before the first step. Runs under jit or `jax.eval_shape`."""
    shape = (1, *model.example_shape)
    # Lazily: the images' way through the flow is not computed, and need not be compiled. Laid out
    # on one device, as one image cannot be split.
    model = model.clone(layout=OneDevice())
    variables = model.lazy_init(key, jax.ShapeDtypeStruct(shape, jnp.float32))
    return from_variables(variables, optimizer, ema=ema)


def abstract_state(model: Flow, optimizer: optax.GradientTransformation, *, ema: bool):
    """Shapes and dtypes of the train state, nothing computed: `ShapeDtypeStruct` leaves."""
    def initial(key):
        return initial_state(key, model, optimizer, ema=ema)

    return jax.eval_shape(initial, jax.random.key(0))


def all_finite(tree) -> jax.Array:
    """Whether every number of a tree of arrays is finite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def parameter_count(state: TrainState) -> int:
    """Number of trained parameters (of one copy, without averages and optimizer moments)."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))
