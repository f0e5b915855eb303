"""Interpolation between examples, by their latents."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import condition as conditions
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition, at_noise_level, check_condition, labels_keyword
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.likelihood import prior_variance
from tarflow_jax.sampling.generate import Denoising, denoised, denoising_of, with_noise
from tarflow_jax.sampling.sample import sample

NEARLY_PARALLEL = 1e-4  # radians; below this a straight line is as good, and does not divide by 0


@labels_keyword
def interpolate(
    model: Flow,
    variables: Variables,
    start: Array,
    end: Array,
    condition: Condition | Array | None = None,
    *,
    steps: int = 9,
    latents: bool = False,
    denoise: float | Sequence[float] | Denoising | None = None,
    key: Array | None = None,
) -> Array:
    """Interpolates spherically between the latents of two batches of examples, and decodes.

    At t from 0 to 1, with w the angle between the latents,

        z = (sin((1 - t) w) z_start + sin(t w) z_end) / sin(w)

    A straight line would pass through latents that are shorter than any that the flow was trained
    on.

    Args:
      start, end: [B, T, D], or images [B, H, W, C].
      condition: of both ends and of everything between, as for `sample`. Label -1, "no class",
        leads from one class to another.
      steps: how many examples, with both ends.
      latents: whether start and end are latents [B, T, D].
      denoise: as for `sample_images`, for flows that were trained with Gaussian noise. Adds noise
        of this level to both ends, which the flow expects, and denoises the results. None leaves
        both out.
      key: of the noise; None is a fixed one.
    Returns:
      float32 [steps, B, ...]; the first and the last are `start` and `end`, up to rounding and
      denoising.
    Raises:
      ValueError: if the arguments do not fit the flow or each other.
    """
    if steps < 2:
        raise ValueError(f'steps {steps} must be at least 2, the two ends.')
    if jnp.shape(start) != jnp.shape(end):
        raise ValueError(
            f'start has shape {jnp.shape(start)} and end {jnp.shape(end)}; pass examples in pairs.'
        )
    batch = jnp.shape(start)[0]
    denoising = None if denoise is None else denoising_of(model, denoise)
    if denoising is not None and denoising.levels:
        condition = at_noise_level(condition, denoising.levels[0])
    condition = check_condition(model, condition, batch)
    if latents:
        if jnp.shape(start)[1:] != model.token_shape:
            T, D = model.token_shape
            raise ValueError(
                f'start has shape {jnp.shape(start)}; latents of this flow are [B, {T}, {D}].'
            )
        ends = [jnp.asarray(start), jnp.asarray(end)]
    else:
        keys = jax.random.split(jax.random.key(0) if key is None else key)
        ends = []
        for examples, own in zip((start, end), keys):
            model.check_examples(examples)
            noisy = with_noise(own, examples, denoising)
            ends.append(_encode(model, variables, noisy, condition))
    noise = _between(*ends, prior_variance(variables), jnp.linspace(0, 1, steps))
    rows = np.tile(np.arange(batch), steps)
    condition = conditions.rows(condition, rows)
    found = sample(model, variables, noise, condition)
    found = denoised(model, variables, found, condition, denoising)
    return found.reshape(steps, batch, *model.example_shape)


@partial(jax.jit, static_argnums=0)
def _encode(model: Flow, variables, examples, condition) -> Array:
    found: Any = model.apply(variables, examples, condition)
    return found[0]


@jax.jit
def _between(a, b, variance, t) -> Array:
    """The standard normal noise [steps * B, T, D] of the latents between."""
    a, b = a / jnp.sqrt(variance), b / jnp.sqrt(variance)
    length = jnp.sqrt(jnp.square(a).sum((1, 2)) * jnp.square(b).sum((1, 2)))
    angle = jnp.arccos(jnp.clip((a * b).sum((1, 2)) / length, -1, 1))[:, None, None]
    t = t[:, None, None, None]
    safe = jnp.maximum(angle, NEARLY_PARALLEL)
    curved = (jnp.sin((1 - t) * safe) * a + jnp.sin(t * safe) * b) / jnp.sin(safe)
    found = jnp.where(angle < NEARLY_PARALLEL, (1 - t) * a + t * b, curved)
    return found.reshape(-1, *a.shape[1:])
