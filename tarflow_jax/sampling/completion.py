"""Completion: draws what is unknown of sequences or images, given what is known.

Shape suffixes: B examples, T tokens, D numbers in a token.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import condition as conditions
from tarflow_jax.flow import decoder
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition, at_noise_level, check_condition, labels_keyword
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.likelihood import prior_variance
from tarflow_jax.flow.mesh_axes import with_auto_axes
from tarflow_jax.flow.order import reorder
from tarflow_jax.flow.products import at_least_float32
from tarflow_jax.sampling import chain
from tarflow_jax.sampling.generate import Denoising, denoised, denoising_of, with_noise
from tarflow_jax.sampling.guided import guided_trajectory
from tarflow_jax.sampling.noise import standard_noise
from tarflow_jax.sampling.sample import sample
from tarflow_jax.sampling.schedule import guidance_params

CANDIDATES = 8  # samples of the flow, of which the most similar one is where a chain starts


class CompletionInfo(NamedTuple):
    """How examples were completed.

    Args:
      exact: whether they are independent draws from p(unknown | known); else they are the ends of
        Markov chains.
      acceptance: float32 of the shape of a log_prob, the share of the chain's proposals that were
        accepted since its burn-in; 1 if exact. Far below 0.5, a chain has hardly moved.
      step_size: of the same shape, what the burn-in ended with; 0 if exact.
    """

    exact: bool
    acceptance: np.ndarray
    step_size: np.ndarray


@labels_keyword
def complete(
    model: Flow,
    variables: Variables,
    key: Array,
    examples: Array,
    known,
    condition: Condition | Array | None = None,
    *,
    num_samples: int | None = None,
    guidance: Guidance | None = None,
    denoise: float | Sequence[float] | Denoising | None = None,
    steps: int = 100,
    leapfrog: int = 10,
    return_log_prob: bool = False,
    return_info: bool = False,
) -> Any:
    """Draws the unknown part of examples from p(unknown | known): inpainting, forecasting.

    Exact if every block reads the known tokens before the unknown ones: their latents depend on
    nothing else, so the other latents are still standard normal. They are drawn and inverted; one
    network call reads the known tokens, so a completion costs less than a sample. Build the flow
    for it. With P known tokens before F unknown ones, these `orders` alternate within both parts:

        past, future = range(P), range(P, P + F)
        orders = [(*past, *future), (*reversed(past), *reversed(future))] * 2

    Blocks that all read in one order are together no more than one block, which makes each token
    Gaussian given those before it; so let the orders differ.

    In all other cases, such as a hole in an image, each completion is the end of a Markov chain of
    its own (`sampling.chain`). It starts from the most similar of a few samples of the flow, and
    the first half of its steps adapts its step size. Its distribution approaches
    p(unknown | known) as `steps` grows. A finite chain is an approximation: it explores the
    surroundings of its start well, and seldom crosses to a mode far away.

    Args:
      examples: [B, T, D] or images [B, H, W, C]; what is unknown of them is ignored and may be NaN.
      known: bool, not traced, True where examples are known: for each token [T] or [B, T]; for each
        pixel [H, W] or [B, H, W]; or for each number, of the shape of the examples.
      condition: as for `sample`, [B].
      num_samples: of each example; None is one, and its axis is left out.
      guidance: completes by the guided flow; None is unguided.
      denoise: as for `sample_images`, for flows that were trained with Gaussian noise. Adds noise
        of this level to what is known, which the flow expects, and denoises the completion. None
        leaves both out.
      steps, leapfrog: of a chain: its proposals, and leapfrog steps for each. A leapfrog step costs
        a forward and a backward pass. leapfrog=1 is the Metropolis-adjusted Langevin algorithm.
      return_log_prob: also return log p(unknown | known) in nats, before denoising; only if exact.
      return_info: also return a `CompletionInfo`.
    Returns:
      completed examples, float32 [B, ...] or [num_samples, B, ...], known numbers as they were;
      with return_log_prob or return_info, a tuple (examples, [log_prob], [info]), log_prob of shape
      [B] or [num_samples, B].
    Raises:
      ValueError: if the arguments do not fit the flow or each other.
    """
    model.check_examples(examples)
    mask = _mask_of(model, known, jnp.shape(examples))
    for name, value in (
        ('num_samples', 1 if num_samples is None else num_samples), ('steps', steps),
        ('leapfrog', leapfrog),
    ):
        if value < 1:
            raise ValueError(f'{name} {value} must be at least 1.')
    denoising = None if denoise is None else denoising_of(model, denoise)
    if denoising is not None and denoising.levels:
        condition = at_noise_level(condition, denoising.levels[0])
    condition = check_condition(model, condition, len(mask))
    if guidance is not None:
        guidance.check(model, condition)
    shape = (*(() if num_samples is None else (num_samples,)), len(mask))
    rows = np.tile(np.arange(len(mask)), num_samples or 1)
    mask, condition = mask[rows], conditions.rows(condition, rows)
    tokens = np.asarray(model.to_tokens(jnp.asarray(mask)))
    exact = is_exact(model, tokens)
    if return_log_prob and not exact:
        raise ValueError(
            'return_log_prob needs blocks that read all known tokens before the others, and with '
            'these orders of the flow they do not; leave it out, or choose the orders for it.'
        )
    given = jnp.asarray(examples, at_least_float32(jnp.result_type(examples)))[rows]
    draw_key, noise_key, denoising_key = (
        key if denoising is None else jax.random.fold_in(key, i) for i in range(3)
    )
    x = _known_part(with_noise(noise_key, given, denoising), mask)
    guided = [guidance_params(model, b, guidance) for b in range(len(model.layers_per_block))]
    if exact:
        found, log_prob = _exact(model, variables, draw_key, x, tokens, condition, guided)
        info = CompletionInfo(True, np.ones(shape, np.float32), np.zeros(shape, np.float32))
    else:
        x = _start(model, variables, draw_key, x, mask, condition, guidance)
        chains = with_auto_axes(
            partial(_run, model), x, variables, jax.random.fold_in(draw_key, CANDIDATES), mask,
            condition, guided, steps, leapfrog,
        )
        found, log_prob = chains.x, chains.log_prob  # the joint one; not returned
        since = steps - steps // 2
        info = CompletionInfo(
            False, np.asarray(chains.accepted / since).reshape(shape),
            np.asarray(jnp.exp(chains.log_step_size)).reshape(shape),
        )
    found = denoised(model, variables, found, condition, denoising, denoising_key)
    results: list[Any] = [_merged(given, mask, found).reshape(*shape, *model.example_shape)]
    if return_log_prob:
        results.append(log_prob.reshape(shape))
    if return_info:
        results.append(info)
    return tuple(results) if len(results) > 1 else results[0]


def _mask_of(model: Flow, known, shape: tuple[int, ...]) -> np.ndarray:
    """`known` for each number of the examples, of their shape."""
    if isinstance(known, jax.core.Tracer):
        raise ValueError('known is traced by jax.jit; pass a numpy array.')
    known = np.asarray(known)
    if known.dtype != bool:
        raise ValueError(f'known is {known.dtype}; pass bool, True where examples are known.')
    if known.shape in (shape[1:-1], shape[:-1]):
        known = known[..., None]
    elif known.shape != shape:
        raise ValueError(
            f'known has shape {known.shape}; for these examples pass {shape[1:-1]}, {shape[:-1]} '
            f'or {shape}.'
        )
    return np.broadcast_to(known, shape)


def is_exact(model: Flow, known_BxTxD: np.ndarray) -> bool:
    """Whether every block reads what is known before what is not.

    One token may be known in part if it comes next in every block: its numbers are independent of
    each other, given the tokens before it.
    """
    whole, some = np.all(known_BxTxD, axis=2), np.any(known_BxTxD, axis=2)
    raster = jnp.arange(whole.shape[1])
    for order in model.block_orders():
        own = np.asarray(reorder(raster, order, axis=0))
        before = np.cumprod(whole[:, own], axis=1).astype(bool)[:, :-1]
        if (some[:, own][:, 1:] & ~before).any():
            return False
    return True


def _exact(model: Flow, variables, key, x, known_BxTxD, condition, guided) -> tuple[Array, Array]:
    """Draws what is unknown of x, where `is_exact`; also returns its log density [B], nats."""
    prefix = int(known_BxTxD.all(2).sum(1).min())
    if prefix == known_BxTxD.shape[1]:
        return x, jnp.zeros(len(x), x.dtype)
    inputs = with_auto_axes(partial(_inputs, model), x, variables, condition, guided)
    z, log_prob = _latents(
        standard_noise(model, key, len(x)), prior_variance(variables), known_BxTxD
    )
    for b in reversed(range(len(guided))):
        z, logdet = with_auto_axes(
            partial(_invert, model.block(b), prefix), z, inputs[b],
            variables['params'][f'block_{b}'], condition, model.block_orders()[b], guided[b],
            known_BxTxD,
        )
        log_prob = log_prob - logdet
    return with_auto_axes(model.from_tokens, z), log_prob


@partial(jax.jit, static_argnums=0)
def _inputs(model: Flow, x, variables, condition, guided) -> list[Array]:
    # Right where x is known: what is unknown comes later in every block.
    return guided_trajectory(model, variables, x, condition, guided)[0][:-1]


def _invert(block, prefix, z, x, params, condition, order, guided, known):
    return decoder.invert(
        block, jnp.where(known, x, z), params, condition, order, guided, known=known,
        prefix=prefix,
    )


def _run(model, x, variables, key, known, condition, guided, steps, leapfrog):
    return chain.run(model, variables, key, x, known, condition, guided, steps, leapfrog)


@jax.jit
def _latents(noise_BxTxD, variance, known_BxTxD) -> tuple[Array, Array]:
    """Latents from standard normal noise, and the log density [B] of those that are unknown."""
    terms = -0.5 * (jnp.square(noise_BxTxD) + jnp.log(2 * math.pi * variance))
    log_prob = jnp.where(known_BxTxD, 0.0, terms).sum((1, 2))
    return noise_BxTxD * jnp.sqrt(variance), log_prob


def _start(model, variables, key, x, known, condition, guidance) -> Array:
    """x, what is unknown of it taken from that sample of the flow whose known part is nearest."""
    best, nearest = x, jnp.full(len(x), jnp.inf)
    for i in range(CANDIDATES):
        noise = standard_noise(model, jax.random.fold_in(key, i), len(x))
        drawn = sample(model, variables, noise, condition, guidance=guidance)
        best, nearest = _nearer(x, known, drawn, best, nearest)
    return best


@jax.jit
def _nearer(x, known, drawn, best, nearest) -> tuple[Array, Array]:
    axes = tuple(range(1, x.ndim))
    distance = jnp.where(known, jnp.square(drawn - x), 0.0).sum(axes)
    # A sample that is not finite is never nearer.
    nearer = (distance < nearest) & jnp.isfinite(drawn).all(axes)
    taken = ~known & jnp.expand_dims(nearer, axes)
    return jnp.where(taken, drawn, best), jnp.where(nearer, distance, nearest)


@jax.jit
def _known_part(x, known) -> Array:
    return jnp.where(known, x, 0.0)


@jax.jit
def _merged(given, known, drawn) -> Array:
    return jnp.where(known, given, drawn)
