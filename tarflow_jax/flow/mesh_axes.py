"""Support for meshes with explicit axes, the default of `jax.make_mesh`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def with_auto_axes(function: Callable, examples: jax.Array, *args) -> Any:
    """Calls function(examples, *args); the partitioner chooses all intermediate shardings.

    On a mesh with explicit axes, JAX asks for the sharding of every ambiguous reshape and gather;
    here the sharding of the batch axis determines them all. Results with a leading batch axis are
    sharded like the examples [B, ...]; other results are replicated.
    """
    sharding: Any = jax.typeof(examples).sharding
    mesh = sharding.mesh
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return function(examples, *args)
    batch, split = examples.shape[0], sharding.spec[0]
    args = jax.tree.map(jnp.asarray, args)
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (examples, *args))
    shapes = jax.eval_shape(function, *whole)
    specs = jax.tree.map(lambda s: P(split) if s.shape[:1] == (batch,) else P(), shapes)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(function, out_sharding=specs)(examples, *args)
