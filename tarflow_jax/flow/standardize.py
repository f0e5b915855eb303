"""Standardizes data before a flow, with the log-determinant that densities need."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


@functools.partial(jax.tree_util.register_dataclass, data_fields=['shift', 'scale'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Standardize:
    """Maps x to y = (x - shift) / scale, a pytree.

        to = tfj.Standardize.fit(x)
        y, logdet = to.forward(x)
        nats = tfj.log_prob(flow, variables, y) + logdet  # the density of x

    Args:
      shift, scale: float32, broadcastable to one example; scale is above 0.
    """

    shift: Array
    scale: Array

    @classmethod
    def fit(cls, x: Array, axis: int | Sequence[int] = 0) -> 'Standardize':
        """Takes the mean and standard deviation of x [N, ...] over `axis`.

        `axis=0` standardizes every dimension by itself. Name more axes where dimensions have to
        keep a common unit: `axis=(0, 1)` has one scale for all tokens of [N, T, D], and
        `axis=(0, 1, 2)` a single one, which keeps the rotations of coordinates.

        Raises:
          ValueError: if `axis` leaves out 0, the examples, or if a dimension is constant or not
            finite.
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if 0 not in axes:
            raise ValueError(f'axis {axis} must hold 0, the axis of examples.')
        wide = np.asarray(x, np.float64)
        shift, scale = (f(wide, axis=axes, keepdims=True)[0] for f in (np.mean, np.std))
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError(
                f'{int((~(scale > 0)).sum())} of {scale.size} dimensions of the examples are '
                'constant or not finite; drop them first.'
            )
        return cls(jnp.asarray(shift, jnp.float32), jnp.asarray(scale, jnp.float32))

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Returns y [B, ...], and the log-determinant of x to y in nats, one number for all."""
        return (x - self.shift) / self.scale, self.logdet(jnp.shape(x)[1:])

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Returns x [B, ...], and the log-determinant of y to x in nats."""
        return y * self.scale + self.shift, -self.logdet(jnp.shape(y)[1:])

    def logdet(self, shape: tuple[int, ...]) -> Array:
        """The log-determinant of `forward` for examples of this shape, in nats."""
        return -jnp.log(jnp.broadcast_to(self.scale, shape)).sum()
