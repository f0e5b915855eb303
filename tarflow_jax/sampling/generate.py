"""From noise to finished samples: drawing, then denoising."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition
from tarflow_jax.flow.denoising import denoise, iterative_denoise
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.products import at_least_float32
from tarflow_jax.sampling.sample import SampleInfo, sample
from tarflow_jax.sampling.schedule import Schedule


@dataclasses.dataclass(frozen=True)
class Denoising:
    """How to remove the noise of training from samples.

    Args:
      noise_std: for a flow trained at one noise level, that level. One step of `denoise` removes
        the noise, in the flow's dtype.
      strength: of this step; 1 is optimal in theory.
      levels: for a noise-conditioned flow, the levels that `iterative_denoise` goes down. It
        computes in float32 whatever the flow's dtype, as the official code does.
      solver, clip: of `iterative_denoise`.
      precision: of the float32 matrix products of `iterative_denoise`, as the field of the flow.
    """

    noise_std: float = 0.0
    strength: float = 1.0
    levels: tuple[float, ...] = ()
    solver: str = 'ode'
    clip: bool = False
    precision: str = 'highest'


class Generated(NamedTuple):
    """The finished `samples`, the `raw` ones before denoising, and `info` if requested."""

    samples: Array
    raw: Array
    info: SampleInfo | None


def generate(
    model: Flow,
    variables: Variables,
    noise: Array,
    condition: Condition | Array | None = None,
    *,
    guidance: Guidance | None = None,
    denoising: Denoising | None = None,
    schedule: Schedule | None = None,
    key: Array | None = None,
    denoising_key: Array | None = None,
    progress: Callable[[int, int], object] | None = None,
    return_info: bool = False,
) -> Generated:
    """Draws samples and denoises them.

    Args:
      noise, condition, guidance, key: as for `sample`.
      denoising: None skips it.
      schedule: how to decode the blocks; None decodes sequentially.
      denoising_key: for the solver 'sde', as for `iterative_denoise`; None is a fixed key.
      progress: as for `iterative_denoise`.
      return_info: also returns a `SampleInfo`.
    """
    found = sample(
        model, variables, noise, condition, guidance=guidance,
        method='sequential' if schedule is None else 'auto', schedule=schedule, key=key,
        return_info=return_info,
    )
    raw, info = found if return_info else (found, None)
    samples = denoised(
        model, variables, raw, condition, denoising, denoising_key, progress=progress
    )
    return Generated(samples, raw, info)


def sample_images(
    model: Flow,
    variables: Variables,
    key: Array,
    count: int,
    labels: Array | int | None = None,
    *,
    features: Array | None = None,
    guidance: Guidance | None = None,
    denoise: float | Sequence[float] | None = None,
    schedule: Schedule | None = None,
) -> Array:
    """Draws `count` finished samples: noise from the key, the inverse of the flow, denoising.

    Args:
      labels: one class for all samples, or int32 [count], -1 for "no class"; None is no class.
      features: float32, [F] for all samples, [count, F], or for each token [count, T, F].
      guidance: None is unguided.
      denoise: the noise level that the flow was trained at; one step of `denoise` removes it. For
        a noise-conditioned flow: one level or falling levels [N] of `iterative_denoise`, of which
        the first is the level that samples are drawn at. None skips denoising; it is for flows
        trained without Gaussian noise.
      schedule: from `calibrate`; None decodes sequentially.
    Returns:
      float32 images [count, H, W, C] in about [-1, 1], or sequences [count, T, D].
    Raises:
      ValueError: if the arguments do not fit the flow or each other.
    """
    if count < 1:
        raise ValueError(f'count {count} must be at least 1.')
    denoising = denoising_of(model, denoise)
    levels = () if denoising is None else denoising.levels
    key, redraw_key = jax.random.split(key)
    condition = Condition(
        labels=None if labels is None else jnp.broadcast_to(jnp.int32(labels), (count,)),
        noise_std=levels[0] if levels else None,
        features=features if features is None or jnp.ndim(features) > 1
        else jnp.broadcast_to(features, (count, *jnp.shape(features))),
    )
    noise = jax.random.normal(key, (count, *model.token_shape))
    return generate(
        model, variables, noise, condition, guidance=guidance, denoising=denoising,
        schedule=schedule, key=None if isinstance(noise, jax.core.Tracer) else redraw_key,
    ).samples


def denoising_of(
    model: Flow, denoise: float | Sequence[float] | Denoising | None
) -> Denoising | None:
    """Makes a `Denoising` of the argument `denoise` of `sample_images`.

    Raises:
      ValueError: if it does not fit the flow.
    """
    if isinstance(denoise, Denoising):
        return denoise
    if denoise is None:
        if model.noise_conditioned:
            raise ValueError(
                'denoise is missing, and this flow is conditioned on a noise level; pass the noise '
                'levels to draw at and to go down.'
            )
        return None
    levels = tuple(map(float, np.atleast_1d(np.asarray(denoise))))
    if model.noise_conditioned:
        return Denoising(levels=levels, precision=model.precision)
    if len(levels) > 1:
        raise ValueError(
            f'denoise {levels} holds several noise levels, which only noise-conditioned flows go '
            'through; pass the level that this flow was trained at.'
        )
    return Denoising(levels[0])


def with_noise(key: Array, examples: Array, denoising: Denoising | None) -> Array:
    """Adds the noise that the denoising removes, at its first level."""
    examples = jnp.asarray(examples, at_least_float32(jnp.result_type(examples)))
    if denoising is None:
        return examples
    level = denoising.levels[0] if denoising.levels else denoising.noise_std
    return examples + level * jax.random.normal(key, examples.shape, examples.dtype)


def denoised(
    model: Flow, variables: Variables, samples: Array, condition, denoising: Denoising | None,
    key: Array | None = None, *, return_path: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Array:
    """Denoises samples [B, ...]; returns them unchanged if `denoising` is None.

    Args:
      key: for the solver 'sde'; None is a fixed key.
      return_path, progress: as for `iterative_denoise`; unused for flows of one noise level.
    """
    if denoising is None:
        return samples
    if not denoising.levels:
        return denoise(
            model, variables, samples, condition, noise_std=denoising.noise_std,
            strength=denoising.strength,
        )
    # The last steps are smaller than what bfloat16 resolves, and rounding errors add up.
    model = model.clone(dtype=at_least_float32(model.dtype), precision=denoising.precision)
    sde = denoising.solver == 'sde'
    return iterative_denoise(
        model, variables, samples, condition, levels=denoising.levels, solver=denoising.solver,
        clip=denoising.clip, key=(jax.random.key(0) if key is None else key) if sde else None,
        return_path=return_path, progress=progress,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of numbered samples: a sample's number alone decides its condition.

    Args:
      num_classes: of the flow.
      label: the class of all samples; -1 goes through the classes in turn.
      noise_std: the level that a noise-conditioned flow draws samples at; None for other flows.
      features: float32 [M, F], used in turn; None for no features.
      class_names: by label; None if the classes have no names.
    """

    num_classes: int = 0
    label: int = -1
    noise_std: float | None = None
    features: np.ndarray | None = None
    class_names: Sequence[str] | None = None

    def name(self, label: int) -> str:
        """Returns the name of a class, such as 'ankle boot', or 'class 9' if it has no name."""
        return f'class {label}' if self.class_names is None else self.class_names[label]

    def captions(self, numbers) -> list[str] | None:
        """Returns the class name of each of these samples; None if the classes have no names."""
        labels = self.labels(numbers)
        if self.class_names is None or labels is None:
            return None
        return [self.name(label) for label in labels]

    def labels(self, numbers) -> np.ndarray | None:
        """Returns the labels of these samples, int32 [n]; None for a flow without classes."""
        if self.num_classes == 0:
            return None
        numbers = np.asarray(numbers)
        if self.label >= 0:
            return np.full(numbers.shape, self.label, np.int32)
        return (numbers % self.num_classes).astype(np.int32)

    def of(self, numbers, labels: np.ndarray | None = None) -> Condition:
        """Returns the condition of the samples with these numbers [n], as host arrays.

        Args:
          labels: int32 [n], replace the labels that belong to the numbers.
        """
        numbers = np.asarray(numbers)
        features = self.features
        return Condition(
            labels=self.labels(numbers) if labels is None else labels,
            noise_std=None if self.noise_std is None else np.float32(self.noise_std),
            features=None if features is None else features[numbers % len(features)],
        )
