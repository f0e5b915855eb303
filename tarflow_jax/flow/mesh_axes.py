"""Meshes whose axes are explicit, as those of `jax.make_mesh` are by default."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P


def with_auto_axes(function: Callable, examples: jax.Array, *args) -> Any:
    """function(examples, *args), the partitioner deciding how its intermediate arrays are split.

    On a mesh with explicit axes, JAX asks for the sharding of every reshape and gather that could
    be split in more than one way; here all follow from the batch axis. Results with a leading batch
    axis are split as the examples [B, ...] are, others are on every device.
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
