"""The affine map of a block, shared by both directions and the log-determinant."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

SCALES = ('exp', 'softplus')
_ONE_AT_ZERO = math.log(math.expm1(1.0))  # softplus(_ONE_AT_ZERO) == 1


class Affine(NamedTuple):
    """z = (x - shift) / sigma and x = sigma z + shift, elementwise, with |sigma| = exp(log_scale).

    Args:
      log_scale: log |sigma|.
      shift: the shift, in the shape of log_scale.
      sign: the sign of sigma, +1 or -1; None for +1 everywhere. Only guidance makes it negative.
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
        """Applies a function to every array that is not None."""
        return jax.tree.map(function, self)


def affine_of(
    outputs: Array, axis: int, *, scale: str = 'exp', limit: float | None = None,
    volume_preserving: bool = False,
) -> Affine:
    """Converts the raw outputs of a Transformer to an affine map.

    Args:
      outputs: raw log-scales a followed by raw shifts m along `axis`; only m if
        `volume_preserving`.
      scale: 'exp' for sigma = exp(a), 'softplus' for sigma = log(1 + exp(a + 0.541325)); both are
        1 at a = 0.
      limit: bounds a and m by c tanh(. / c); None sets no bound.
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
    """Computes log(log(1 + exp(x))); far below 0, where that underflows, as x - exp(x) / 2."""
    low = x < -15.0
    series = x - 0.5 * jnp.exp(jnp.minimum(x, -15.0))
    return jnp.where(low, series, jnp.log(jax.nn.softplus(jnp.maximum(x, -15.0))))
