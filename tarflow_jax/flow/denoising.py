"""Denoising by the flow's exact score: one step (Tweedie), or many down to noise level 0."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import (
    Condition,
    as_condition,
    at_noise_level,
    check_condition,
    labels_keyword,
)
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.likelihood import score

SOLVERS = ('ode', 'sde')


@labels_keyword
def denoise(
    model: Flow,
    variables: Variables,
    examples: Array,
    condition: Condition | Array | None = None,
    *,
    noise_std: float | Array,
    strength: float = 1.0,
) -> Array:
    """Takes one step of score-based denoising (Tweedie; TarFlow, section 3.3, eq. 9).

        x + strength * noise_std^2 * d/dx log p(x)

    Args:
      examples: [B, ...], samples of a flow trained with Gaussian noise of `noise_std`.
      condition: the condition of the samples.
      noise_std: one level for all examples, or [B].
      strength: multiplies the step; 1 is the theoretical optimum.
    Returns:
      the denoised examples [B, ...].
    Raises:
      ValueError: if examples or condition do not fit the model.
    """
    model.check_examples(examples)
    condition = check_condition(model, condition, jnp.shape(examples)[0])
    step = jnp.reshape(strength * jnp.square(noise_std), (-1, *[1] * (jnp.ndim(examples) - 1)))
    return _denoise(model, variables, examples, condition, step)


@partial(jax.jit, static_argnums=0)
def _denoise(model: Flow, variables, examples: Array, condition, step) -> Array:
    return examples + step * score(model, variables, examples, condition)


def iterative_denoise(
    model: Flow,
    variables: Variables,
    images: Array,
    condition: Condition | Array | None = None,
    *,
    levels,
    solver: str = 'ode',
    clip: bool = False,
    key: Array | None = None,
    return_path: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Array:
    """Denoises in many steps, from the first noise level to 0 (iTARFlow).

    With the estimate x0 = x + t^2 d/dx log p(x | t) at each level t, and r = t' / t for the next,

        ode   x <- x0 + r (x - x0)
        sde   x <- x0 + t' (r (x - x0) / t + sqrt(1 - r^2) n),  n standard normal

    The last step goes to level 0 and returns x0. Each step costs a forward and a backward pass in
    the flow's dtype. The official code uses float32 here even for flows trained in bfloat16.

    Args:
      images: [B, ...], samples at the first level.
      condition: the condition of the samples; `levels` replaces its noise_std.
      levels: [N], decreasing and above 0.
      clip: whether to clip each estimate to [-1, 1].
      key: random key for 'sde': one key, or one per example [B]. With one per example, an example's
        noise does not depend on the rest of the batch.
      return_path: whether to return the images at every level too.
      progress: called once after each step with (steps done, total steps). Pass the same function
        to every call, because it is compiled into the program. JAX's compilation cache skips such
        programs. Not supported with several processes.
    Returns:
      the denoised examples [B, ...]. With return_path, [N + 1, B, ...]: entry i is at level i, the
      first entry is `images` and the last is the result.
    Raises:
      ValueError: if the arguments do not fit the model or each other.
    """
    if not model.noise_conditioned:
        raise ValueError(
            'iterative_denoise needs a flow with noise_conditioned=True; use denoise instead.'
        )
    if solver not in SOLVERS:
        raise ValueError(f'solver {solver!r} must be one of {", ".join(SOLVERS)}.')
    if (key is not None) != (solver == 'sde'):
        raise ValueError("solver 'sde' needs a key; solver 'ode' takes none.")
    levels = np.asarray(levels, np.float32)
    if levels.ndim != 1 or not levels.size or not (np.diff(levels, append=0.0) < 0).all():
        raise ValueError(f'levels {levels} must be a decreasing sequence of numbers above 0.')
    model.check_examples(images)
    condition = check_condition(
        model, at_noise_level(condition, levels[0]), jnp.shape(images)[0]
    )
    if key is not None and key.shape == ():
        key = jax.random.split(key, jnp.shape(images)[0])
    if progress is not None and jax.process_count() > 1:
        raise ValueError(
            f'progress supports one process, not {jax.process_count()}; leave it out.'
        )
    return _iterate(
        model, variables, images, condition, jnp.asarray(levels), clip, key, return_path, progress
    )


@partial(jax.jit, static_argnums=(0, 5, 7, 8))
def _iterate(
    model: Flow, variables, examples, condition, levels, clip: bool, keys, return_path: bool,
    progress: Callable | None,
) -> Array:
    def step(x, inputs):
        i, level, following = inputs
        at_level = at_noise_level(as_condition(condition), level)
        clean = x + level**2 * score(model, variables, x, at_level)
        clean = jnp.clip(clean, -1, 1) if clip else clean
        noise = None
        if keys is not None:
            noise = jax.vmap(
                lambda key: jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype)
            )(keys)
        x = next_examples(x, clean, level, following, noise)
        if progress is not None:
            # The sum makes the callback wait for the step.
            jax.debug.callback(partial(_report, progress, levels.size), i, x.sum())
        return x, x if return_path else None

    steps = (jnp.arange(levels.size), levels, jnp.append(levels[1:], 0.0))
    last, way = jax.lax.scan(step, examples, steps)
    return jnp.concatenate([examples[None], way]) if return_path else last


def _report(progress: Callable, steps: int, i, _) -> None:
    progress(int(i) + 1, steps)


def next_examples(x, clean, level, following, noise: Array | None) -> Array:
    """Moves examples to the next level: the step of 'sde' if noise is given, else of 'ode'."""
    ratio = following / level
    if noise is None:
        return clean + ratio * (x - clean)
    return clean + following * (ratio * (x - clean) / level + jnp.sqrt(1 - ratio**2) * noise)
