"""Descriptions of a flow's arrays: shapes, logical axes and initial distributions."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# The most random numbers that one call generates for several arrays. Larger arrays have their own
# call, which the partitioner can split over a mesh.
_DRAWN_TOGETHER = 2**26


@dataclasses.dataclass(frozen=True)
class Parameter:
    """The description of one array of a flow.

    Args:
      shape: shape of the array.
      axes: a logical name for each axis; `training.sharding` maps the names to a mesh.
      init: 'uniform' in [-scale, scale], 'normal' with standard deviation `scale`, 'zeros', 'ones'.
      scale: scale of the initial distribution.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Literal['uniform', 'normal', 'zeros', 'ones'] = 'zeros'
    scale: float = 1.0

    def stacked(self, count: int) -> 'Parameter':
        """Stacks `count` independent arrays along a new leading axis 'layers'."""
        return dataclasses.replace(
            self, shape=(count, *self.shape), axes=('layers', *self.axes)
        )

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def is_parameter(x: Any) -> bool:
    return isinstance(x, Parameter)


def linear(
    inputs: dict[str, int], outputs: dict[str, int], *, bias: str | tuple[str, ...] | None = None,
    zero_kernel: bool = False,
) -> dict[str, Parameter]:
    """Describes a linear layer with the initialization of torch.nn.Linear.

    The kernel is [*inputs, *outputs] and the bias [*outputs].

    Args:
      inputs, outputs: sizes by logical axis name, in order.
      bias: logical axes of the bias; None for those of the outputs.
      zero_kernel: whether to initialize the kernel to zero.
    """
    bound = 1.0 / math.sqrt(math.prod(inputs.values()))
    bias = tuple(outputs) if bias is None else (bias,) if isinstance(bias, str) else bias
    kernel_shape = (*inputs.values(), *outputs.values())
    return {
        'kernel': Parameter(
            kernel_shape, (*inputs, *outputs), 'zeros' if zero_kernel else 'uniform', bound
        ),
        'bias': Parameter(tuple(outputs.values()), bias, 'uniform', bound),
    }


def abstract(tree) -> Any:
    """Returns a tree of float32 `jax.ShapeDtypeStruct` for a tree of `Parameter`."""
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), tree, is_leaf=is_parameter
    )


def initialize(key: Array, tree) -> Any:
    """Initializes float32 arrays for a tree of `Parameter`.

    One call generates the random numbers of many small arrays: XLA takes a tenth of a second to
    compile each call of a random number generator, and a flow has hundreds of arrays.
    """
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_parameter)
    drawn: list[Array | None] = [None] * len(leaves)
    together = []
    for i, leaf in enumerate(leaves):
        if leaf.init in ('zeros', 'ones'):
            drawn[i] = getattr(jnp, leaf.init)(leaf.shape)
        elif leaf.size >= _DRAWN_TOGETHER:
            drawn[i] = _scaled(_uniform(jax.random.fold_in(key, i), leaf.shape), leaf)
        else:
            together.append(i)
    # Grouping keeps the memory of a call below that of the largest arrays.
    while together:
        ends = np.cumsum([leaves[i].size for i in together])
        count = max(1, int(np.searchsorted(ends, _DRAWN_TOGETHER, 'right')))
        group, together = together[:count], together[count:]
        numbers = _uniform(jax.random.fold_in(key, group[0]), (int(ends[count - 1]),))
        for i, part in zip(group, jnp.split(numbers, ends[: count - 1])):
            drawn[i] = _scaled(part.reshape(leaves[i].shape), leaves[i])
    return jax.tree.unflatten(structure, drawn)


def _uniform(key: Array, shape: tuple[int, ...]) -> Array:
    # Exclude -1, where erf_inv is infinite.
    low = np.nextafter(np.float32(-1), np.float32(0))
    return jax.random.uniform(key, shape, jnp.float32, low, 1.0)


def _scaled(numbers: Array, parameter: Parameter) -> Array:
    if parameter.init == 'normal':
        numbers = np.float32(math.sqrt(2)) * jax.lax.erf_inv(numbers)
    return parameter.scale * numbers
