"""The condition of a flow: classes, a noise level and features, in any combination.

The flow embeds a condition (`Block.context`); guidance and training drop parts of it. All other
code passes it on unread.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
R = TypeVar('R')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """The condition of a batch; a pytree.

    Args:
      labels: int32 [B], classes; -1 means no class. None means no class for the whole batch.
      noise_std: float32 [B] or a number above 0: the standard deviation of the Gaussian noise in
        the data. Required if the flow has `noise_conditioned=True`, otherwise an error.
      features: float32, one vector per example [B, F] or per token [B, T, F]. A vector of NaN means
        no features. None means no features for the whole batch.
    """

    labels: Any = None
    noise_std: Any = None
    features: Any = None


def as_condition(condition) -> Condition:
    """Converts labels (int32 [B] or None) to a `Condition`; returns a `Condition` unchanged."""
    return condition if isinstance(condition, Condition) else Condition(labels=condition)


def labels_keyword(function: Callable[..., R]) -> Callable[..., R]:
    """Lets callers pass `labels=` instead of `condition=` to a function."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if 'labels' in kwargs:
            kwargs['condition'] = kwargs.pop('labels')
        return function(*args, **kwargs)

    return call


def batch_size_of(condition) -> int | None:
    """Returns the batch size of a condition; None if it fits any batch size."""
    arrays = [x for x in jax.tree.leaves(as_condition(condition)) if np.ndim(x)]
    return np.shape(arrays[0])[0] if arrays else None


def informative(flow, condition) -> bool:
    """Returns whether the condition has classes or features that the flow uses."""
    c = as_condition(condition)
    return bool(
        (flow.num_classes and c.labels is not None)
        or (flow.num_features and c.features is not None)
    )


def at_noise_level(condition, noise_std) -> Condition:
    """Replaces the noise level of a condition by `noise_std`, float32 [B] or a number."""
    return dataclasses.replace(as_condition(condition), noise_std=noise_std)


def per_example(condition, batch: int) -> Condition:
    """Broadcasts the noise level of a condition to one level per example."""
    c = as_condition(condition)
    if c.noise_std is None:
        return c
    return at_noise_level(c, jnp.broadcast_to(jnp.asarray(c.noise_std), (batch,)))


def drop(condition, dropped_B: Array) -> Condition:
    """Drops classes and features (not the noise level) of the examples where `dropped_B`."""
    c = as_condition(condition)
    labels, features = c.labels, c.features
    if labels is not None:
        labels = jnp.where(dropped_B, -1, labels)
    if features is not None:
        mask = dropped_B.reshape(-1, *[1] * (features.ndim - 1))
        features = jnp.where(mask, jnp.nan, features)
    return Condition(labels, c.noise_std, features)


def both_branches(condition, batch: int) -> Condition:
    """Repeats each example's condition twice, the second time without classes and features."""
    def double(x):
        x = jnp.asarray(x)
        return x if x.ndim == 0 else jnp.repeat(x, 2, axis=0)

    doubled = jax.tree.map(double, as_condition(condition))
    return drop(doubled, jnp.arange(2 * batch) % 2 == 1)


def rows(condition, index) -> Condition:
    """Selects the conditions of some examples of the batch."""
    def take(x):
        return x[index] if np.ndim(x) else x

    return jax.tree.map(take, as_condition(condition))


def check_condition(flow, condition, batch: int) -> Condition:
    """Checks a condition against a flow; checks values only outside `jax.jit`.

    Args:
      flow: any object with `num_classes`, `num_features`, `noise_conditioned` and `token_shape`.
      condition: see `as_condition`.
    Returns:
      the condition, as a `Condition`.
    Raises:
      ValueError: if shapes, types or values do not fit.
    """
    c = as_condition(condition)
    if c.labels is not None:
        _check_labels(flow.num_classes, c.labels, batch)
    if flow.noise_conditioned and c.noise_std is None:
        raise ValueError(
            'noise_std is missing, but this flow is conditioned on a noise level; pass '
            'Condition(noise_std=...).'
        )
    if c.noise_std is not None:
        if not flow.noise_conditioned:
            raise ValueError(
                'noise_std is given, but this flow is not conditioned on a noise level; leave it '
                'out, or build the flow with noise_conditioned=True.'
            )
        if np.shape(c.noise_std) not in ((), (batch,)):
            raise ValueError(
                f'noise_std has shape {np.shape(c.noise_std)}; pass a number or shape ({batch},), '
                'one level per example.'
            )
        level = _concrete(c.noise_std)
        if level is not None and not (np.isfinite(level) & (level > 0)).all():
            raise ValueError(f'noise_std {level} must be finite and above 0.')
    if c.features is not None:
        _check_features(flow, c.features, batch)
    return c


def _check_labels(num_classes: int, labels, batch: int) -> None:
    if jnp.shape(labels) != (batch,):
        raise ValueError(
            f'labels have shape {jnp.shape(labels)}; a batch of {batch} needs ({batch},).'
        )
    if not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        raise ValueError(
            f'labels are {jnp.result_type(labels)}; pass int32 class numbers, or '
            'Condition(features=...) for numbers that are not classes.'
        )
    values = _concrete(labels) if num_classes else None
    if values is None:
        return
    wrong = values[(values < -1) | (values >= num_classes)]
    if wrong.size:
        raise ValueError(
            f'label {wrong[0]} is outside 0..{num_classes - 1}, the classes of this flow '
            '(-1 means no class).'
        )


def _check_features(flow, features, batch: int) -> None:
    F, (T, _) = flow.num_features, flow.token_shape
    if F == 0:
        raise ValueError(
            'features are given, but this flow takes none; leave them out, or build the flow with '
            'num_features.'
        )
    if jnp.shape(features) not in ((batch, F), (batch, T, F)):
        raise ValueError(
            f'features have shape {jnp.shape(features)}; this flow takes [{batch}, {F}] or '
            f'[{batch}, {T}, {F}].'
        )
    if not jnp.issubdtype(jnp.result_type(features), jnp.floating):
        raise ValueError(f'features are {jnp.result_type(features)}; pass float32.')
    values = _concrete(features)
    if values is None:
        return
    missing = np.isnan(values)
    if np.isinf(values).any() or (missing.any(-1) != missing.all(-1)).any():
        raise ValueError(
            'features are not finite; each vector must be all finite, or all NaN for "no '
            'features".'
        )


def _concrete(x) -> np.ndarray | None:
    """Returns the values as NumPy, or None if they are traced or on another process."""
    if isinstance(x, jax.core.Tracer):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)
