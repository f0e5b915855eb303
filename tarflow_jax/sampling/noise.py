"""The noise that samples begin from."""

from functools import partial

import jax

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.flow import Flow


@partial(jax.jit, static_argnums=(0, 2))
def standard_noise(model: Flow, key: Array, count: int) -> Array:
    """Standard normal noise [count, T, D], laid out as the flow has it."""
    noise = jax.random.normal(key, (count, *model.token_shape))
    return model.layout.constrain(noise, 'batch', 'length', 'token')


@partial(jax.jit, static_argnums=0)
def noise_of_examples(model: Flow, key: Array, numbers: Array, attempt) -> Array:
    """Standard normal noise [n, T, D], each example's from its number and the attempt alone."""

    def one(number):
        own = jax.random.fold_in(jax.random.fold_in(key, number), attempt)
        return jax.random.normal(own, model.token_shape)

    return model.layout.constrain(jax.vmap(one)(numbers), 'batch', 'length', 'token')
