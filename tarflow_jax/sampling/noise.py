"""The noise that sampling starts from."""

from functools import partial

import jax

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.flow import Flow


@partial(jax.jit, static_argnums=(0, 2))
def standard_noise(model: Flow, key: Array, count: int) -> Array:
    """Draws standard normal noise [count, T, D], laid out over the flow's mesh."""
    noise = jax.random.normal(key, (count, *model.token_shape))
    return model.layout.constrain(noise, 'batch', 'length', 'token')


@jax.jit
def keys_of_examples(key: Array, numbers: Array, attempt) -> Array:
    """Makes a key for each example [n]; it depends on the example's number and the attempt only."""
    return jax.vmap(lambda n: jax.random.fold_in(jax.random.fold_in(key, n), attempt))(numbers)


@partial(jax.jit, static_argnums=0)
def noise_of_examples(model: Flow, key: Array, numbers: Array, attempt) -> Array:
    """Draws standard normal noise [n, T, D] by `keys_of_examples`."""
    keys = keys_of_examples(key, numbers, attempt)
    noise = jax.vmap(lambda own: jax.random.normal(own, model.token_shape))(keys)
    return model.layout.constrain(noise, 'batch', 'length', 'token')
