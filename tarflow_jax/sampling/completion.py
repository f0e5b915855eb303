"""Completion: draws what is unknown of sequences or images, given what is known.

Shape suffixes: B examples, T tokens, D numbers in a token.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import condition as conditions
from tarflow_jax.flow import decoder
from tarflow_jax.flow.attention import Array, at_least_float32
from tarflow_jax.flow.condition import Condition, check_condition, labels_keyword
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.likelihood import prior_variance
from tarflow_jax.flow.mesh_axes import with_auto_axes
from tarflow_jax.flow.order import reorder, restore
from tarflow_jax.sampling.sample import guided_affine
from tarflow_jax.sampling.schedule import guidance_params


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
    return_log_prob: bool = False,
) -> Any:
    """Draws the unknown part of examples from p(unknown | known): inpainting, forecasting.

    Exact where every block reads the known tokens before the unknown ones: their latents then
    depend on nothing else, so the latents of the unknown tokens are independent of them and still
    standard normal. They are drawn and inverted, which costs less than a sample. Choose `orders`
    of the flow for it, such as these, for a past of P tokens and a future of F:

        past, future = range(P), range(P, P + F)
        orders = [(*past, *future), (*reversed(past), *reversed(future))] * 2

    Args:
      examples: [B, T, D] or images [B, H, W, C]; what is unknown of them is ignored and may be NaN.
      known: bool, concrete, True where examples are known: by token for sequences, [T] or [B, T],
        and by pixel for images, [H, W] or [B, H, W]; or of the shape of the examples.
      condition: as for `sample`, [B].
      num_samples: of each example; None is one, without the axis for it.
      guidance: completes under the guided flow; None is unguided.
      return_log_prob: also return log p(unknown | known) of what was drawn, in nats.
    Returns:
      the completed examples, float32 [B, ...] or [num_samples, B, ...], what is known as it was;
      with return_log_prob a tuple of them and log_prob, [B] or [num_samples, B].
    Raises:
      ValueError: if the arguments do not fit the flow or each other.
    """
    model.check_examples(examples)
    condition = check_condition(model, condition, jnp.shape(examples)[0])
    if guidance is not None:
        guidance.check(model, condition)
    mask = _mask(model, known, jnp.shape(examples))
    count = 1 if num_samples is None else num_samples
    if count < 1:
        raise ValueError(f'num_samples {num_samples} must be at least 1.')
    rows = np.tile(np.arange(len(mask)), count)
    x = jnp.where(mask, jnp.asarray(examples, at_least_float32(examples.dtype)), 0.0)[rows]
    mask, condition = mask[rows], conditions.rows(condition, rows)
    tokens = np.asarray(model.to_tokens(mask))
    if not is_exact(model, tokens):
        raise ValueError(
            'known must be the first tokens of every block; set the orders of the flow so that '
            'each block reads them first.'
        )
    noise = jax.random.normal(key, tokens.shape, x.dtype)
    drawn = _exact(model, variables, x, tokens, noise, condition, guidance)
    shape = jnp.shape(examples) if num_samples is None else (count, *jnp.shape(examples))
    found = jnp.where(mask, x, drawn.examples).reshape(shape)
    if return_log_prob:
        return found, drawn.log_prob.reshape(shape[: 1 + (num_samples is not None)])
    return found


class _Drawn(NamedTuple):
    """Completed examples [B, ...], and log p(unknown | known) of them, [B] in nats."""

    examples: Array
    log_prob: Array


def _mask(model: Flow, known, shape: tuple[int, ...]) -> np.ndarray:
    """`known` for each number of the examples, of their shape."""
    if isinstance(known, jax.core.Tracer):
        raise ValueError('known is traced by jax.jit; pass a numpy array.')
    known = np.asarray(known)
    if known.dtype != bool:
        raise ValueError(f'known has type {known.dtype}; pass bool, True where examples are known.')
    if known.shape in (shape[1:-1], shape[:-1]):
        known = known[..., None]
    elif known.shape != shape:
        raise ValueError(
            f'known has shape {known.shape}; pass {shape[1:-1]}, {shape[:-1]} or {shape}.'
        )
    return np.broadcast_to(known, shape)


def is_exact(model: Flow, known_BxTxD: np.ndarray) -> bool:
    """Whether every block reads what is known before what is not.

    One token may be known in part if it comes next in every block: its numbers are independent of
    each other, given the tokens before it.
    """
    whole, some = known_BxTxD.all(2), known_BxTxD.any(2)
    raster = np.arange(whole.shape[1])
    for order in model.block_orders():
        own = np.asarray(reorder(raster, order, axis=0))
        before = np.cumprod(whole[:, own], axis=1).astype(bool)[:, :-1]
        if (some[:, own][:, 1:] & ~before).any():
            return False
    return True


def _exact(model: Flow, variables, x, known_BxTxD, noise, condition, guidance) -> _Drawn:
    """Draws what is unknown, where `is_exact`; `noise` [B, T, D] is standard normal."""
    prefix = int(known_BxTxD.all(2).sum(1).min())
    if prefix == known_BxTxD.shape[1]:
        return _Drawn(x, jnp.zeros(len(x), x.dtype))
    guided = [guidance_params(model, b, guidance) for b in range(len(model.layers_per_block))]
    inputs = with_auto_axes(partial(_inputs, model), x, variables, condition, guided)
    variance = prior_variance(variables)
    z, logdet = noise * jnp.sqrt(variance), 0.0
    log_prior = _log_prior(z, variance, known_BxTxD)
    for b in reversed(range(len(guided))):
        z, own = with_auto_axes(
            partial(_invert, model.block(b), prefix), jnp.where(known_BxTxD, inputs[b], z),
            variables['params'][f'block_{b}'], condition, model.block_orders()[b], guided[b],
            known_BxTxD,
        )
        logdet = logdet + own
    return _Drawn(with_auto_axes(model.from_tokens, z), log_prior - logdet)


@partial(jax.jit, static_argnums=0)
def _inputs(model: Flow, x, variables, condition, guidance) -> list[Array]:
    """The input of every block [B, T, D], right at all tokens whose number is known."""
    inputs = [model.to_tokens(x)]
    for b, order in enumerate(model.block_orders()[:-1]):
        own = reorder(inputs[b], order)
        affine = guided_affine(
            model, variables, b, own, condition=condition, guidance=guidance[b]
        )
        inputs.append(restore(affine.forward(own), order))
    return inputs


def _invert(block, prefix, x_BxTxD, params, condition, order, guidance, known):
    return decoder.invert(
        block, x_BxTxD, params, condition, order, guidance, known=known, prefix=prefix
    )


@jax.jit
def _log_prior(z_BxTxD, variance, known_BxTxD) -> Array:
    """The log density of the unknown latents, [B] in nats."""
    terms = jnp.square(z_BxTxD) / variance + jnp.log(2 * math.pi * variance)
    return -0.5 * jnp.where(known_BxTxD, 0.0, terms).sum((1, 2))
