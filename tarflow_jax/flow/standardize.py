"""Maps data to roughly a standard normal before a flow, with the log-determinant of the map."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri

Array = jax.Array
EDGE = 1e-7  # approximate resolution of float32 below 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=['shift', 'scale'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Standardize:
    """Maps x to y = (x - shift) / scale, a pytree.

        to = tfj.Standardize.fit(x)
        y, logdet = to.forward(x)
        nats = tfj.log_prob(flow, variables, y) + logdet  # the density of x

    Args:
      shift, scale: float32, broadcastable to one example; scale is above 0.
    Raises:
      ValueError: by `forward` and `inverse`, if they do not broadcast to one example.
    """

    shift: Array
    scale: Array

    @classmethod
    def fit(cls, x: Array, axis: int | Sequence[int] = 0) -> 'Standardize':
        """Takes the mean and standard deviation of x [N, ...] over `axis`.

        `axis=0` standardizes every dimension separately. Pass more axes if dimensions share a unit:
        `axis=(0, 1)` uses one scale for all tokens of [N, T, D], and `axis=(0, 1, 2)` a single
        scale, which preserves rotations of coordinates.

        Raises:
          ValueError: if `axis` leaves out 0, the examples, or if a dimension is constant or not
            finite.
        """
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        if 0 not in axes:
            raise ValueError(f'axis {axis} must include 0, the axis of examples.')
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
        _check_shape(x, self.shift, self.scale)
        return (x - self.shift) / self.scale, self.logdet(jnp.shape(x)[1:])

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Returns x [B, ...], and the log-determinant of y to x in nats."""
        _check_shape(y, self.shift, self.scale)
        return y * self.scale + self.shift, -self.logdet(jnp.shape(y)[1:])

    def logdet(self, shape: tuple[int, ...]) -> Array:
        """Returns the log-determinant of `forward` for examples of this shape, in nats."""
        return -jnp.log(jnp.broadcast_to(self.scale, shape)).sum()


@functools.partial(jax.tree_util.register_dataclass, data_fields=['low', 'high'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probit:
    """Maps numbers between two bounds to the real line, y = Phi^-1((x - low) / (high - low)).

    Phi is the cumulative distribution of the standard normal, so that a uniform prior on the box
    becomes a standard normal. Every sample of a flow over y lies within the bounds.

        to = tfj.Probit(-1.0, 1.0)
        y, logdet = to.forward(x)
        nats = tfj.log_prob(flow, variables, y) + logdet  # the density of x

    Args:
      low, high: the bounds, numbers or arrays broadcastable to one example; low is below high.
    Raises:
      ValueError: if a bound is not finite, or low is not below high; by `forward` and `inverse`,
        if they do not broadcast to one example.
    """

    low: Any
    high: Any

    def __post_init__(self):
        for bound in (self.low, self.high):
            traced = isinstance(bound, jax.core.Tracer)
            if traced or not isinstance(bound, int | float | np.ndarray | jax.Array):
                return  # JAX may rebuild pytrees with arbitrary leaves
        low, high = np.asarray(self.low), np.asarray(self.high)
        if not (np.isfinite(low) & np.isfinite(high) & (low < high)).all():
            raise ValueError(
                f'low {self.low} must be below high {self.high}, and both finite; use Standardize '
                'for unbounded numbers.'
            )

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Returns y [B, ...], and the log-determinants of x to y, [B] in nats.

        Numbers at or outside of a bound map to about -5 or 5, the limits of float32.
        """
        _check_shape(x, self.low, self.high)
        y = ndtri(jnp.clip((x - self.low) / (self.high - self.low), EDGE, 1 - EDGE))
        return y, self._logdet(y)

    def inverse(self, y: Array) -> tuple[Array, Array]:
        """Returns x [B, ...], and the log-determinants of y to x, [B] in nats."""
        _check_shape(y, self.low, self.high)
        return self.low + (self.high - self.low) * ndtr(y), -self._logdet(y)

    def _logdet(self, y: Array) -> Array:
        """Returns the log-determinants of `forward` at its result y."""
        terms = 0.5 * jnp.square(y) + 0.5 * math.log(2 * math.pi)
        terms = terms - jnp.log(jnp.asarray(self.high) - jnp.asarray(self.low))
        return terms.sum(tuple(range(1, y.ndim)))


def _check_shape(x, *parameters) -> None:
    """ValueError unless the parameters broadcast to one example of x."""
    shape = jnp.shape(x)[1:]
    for own in map(jnp.shape, parameters):
        fits = (a in (1, b) for a, b in zip(own[::-1], shape[::-1]))
        if len(own) > len(shape) or not all(fits):
            raise ValueError(
                f'the examples have shape {jnp.shape(x)}, and what maps them has shape {own}; it '
                f'must broadcast to one example, {shape}.'
            )
