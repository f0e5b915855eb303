"""The affine map of a block, written once for both directions and the log-determinant."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

SCALES = ('exp', 'softplus')
_ONE_AT_ZERO = math.log(math.expm1(1.0))  # softplus of it is 1


class Affine(NamedTuple):
    """z = (x - shift) / sigma and x = sigma z + shift, elementwise, with |sigma| = exp(log_scale).

    Args:
      log_scale: log |sigma|.
      shift: of the same shape.
      sign: of sigma, +1 or -1; None is +1 throughout. Only guidance makes scales negative.
    """

    log_scale: Array
    shift: Array
    sign: Array | None = None

    def forward(self, x: Array) -> Array:
        z = (x - self.shift) * jnp.exp(-self.log_scale)
        return z if self.sign is None else z * self.sign

    def inverse(self, z: Array) -> Array:
        sigma = jnp.exp(self.log_scale)
        return z * (sigma if self.sign is None else sigma * self.sign) + self.shift

    def map(self, function) -> 'Affine':
        """The function of every array that is there."""
        return jax.tree.map(function, self)


def affine_of(
    outputs: Array, axis: int, *, scale: str = 'exp', limit: float | None = None,
    volume_preserving: bool = False,
) -> Affine:
    """The affine map that the raw outputs of a Transformer stand for.

    Args:
      outputs: raw log-scales a, then raw shifts m, along the axis; volume preserving: m alone.
      scale: sigma is exp(a), or 'softplus': log(1 + exp(a + 0.541325)), both 1 at a = 0.
      limit: c bounds a and m by c tanh(. / c); None does not.
    """
    if limit is not None:
        outputs = limit * jnp.tanh(outputs / limit)
    if volume_preserving:
        return Affine(jnp.zeros_like(outputs), outputs)
    a, shift = jnp.split(outputs, 2, axis=axis)
    if scale == 'softplus':
        a = _log_softplus(a + _ONE_AT_ZERO)
    return Affine(a, shift)


def _log_softplus(x: Array) -> Array:
    """log(log(1 + exp(x))), which is x - exp(x) / 2 far below 0, where the inner log underflows."""
    low = x < -15.0
    series = x - 0.5 * jnp.exp(jnp.minimum(x, -15.0))
    return jnp.where(low, series, jnp.log(jax.nn.softplus(jnp.maximum(x, -15.0))))
