"""Variables of any flow without the time that `init` takes to compile."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, seed=0, scale=0.1):
    """As `model.init` returns them, with numbers that make a flow far from the identity."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *model.example_shape)))
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        around = 1.0 if path[-1].key in ('scale', 'variance') else 0.0
        return jnp.asarray(around + scale * rng.standard_normal(shape.shape), shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)
