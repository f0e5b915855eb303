"""From samples of a flow to those of an unnormalized density: importance weights, and annealing.

Tan et al., "Scalable Equilibrium Sampling with Sequential Boltzmann Generators" (arXiv 2502.18462),
move a flow's samples to the target by Langevin dynamics. Here each move has a Metropolis test, so
that the weights are exact for every step size (Neal, "Annealed Importance Sampling", 2001; with
resampling: Del Moral, Doucet and Jasra, "Sequential Monte Carlo Samplers", 2006). Adaptive steps:
Zhou, Johansen and Aston, "Toward Automatic Model Comparison" (2016).

Shape suffixes: B samples, T tokens, D numbers in a token.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow import condition as conditions
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.likelihood import log_prob

Array = jax.Array

TARGET_ACCEPTANCE = 0.574  # of Metropolis-adjusted Langevin moves in many dimensions


def effective_sample_size(log_weights: Array) -> Array:
    """Returns Kish's effective sample size of importance weights, a number from 1 to B.

        log_weights = log_target(x) - log_prob  # up to a constant
        share = tfj.effective_sample_size(log_weights) / log_weights.size

    Args:
      log_weights: [B]; -inf is a weight of 0. NaN gives NaN.
    """
    weights = jnp.exp(log_weights - jnp.max(log_weights))
    return jnp.square(weights.sum()) / jnp.square(weights).sum()


class Annealed(NamedTuple):
    """What `anneal` returns; B samples, S steps.

    Args:
      samples: float32 [B, T, D], of the target once weighted.
      log_weights: float32 [B].
      log_normalizer: log of the integral of exp(log_target), in nats; -log_normalizer is the free
        energy in units of kT.
      ancestors: int32 [B], the index of the sample that each comes from. Resampling makes fewer
        of them distinct.
      effective: float32 [S], the effective sample size over B before each step's resampling.
      acceptance: float32 [S], the share of moves accepted.
      times: float32 [S], from 0 for the flow to 1 for the target, behind each step.
    """

    samples: Array
    log_weights: Array
    log_normalizer: Array
    ancestors: Array
    effective: Array
    acceptance: Array
    times: Array


def anneal(
    flow: Flow,
    variables: Variables,
    log_target: Callable[[Array], Array],
    samples: Array,
    condition=None,
    *,
    key: Array,
    steps: int = 100,
    step_size: float = 1e-2,
    resample_below: float = 0.5,
    keep: float | None = None,
    batch_size: int = 1024,
) -> Annealed:
    """Moves samples of a flow to a target density, and weights them.

    Step s of S weights the samples for exp((1 - s/S) log_prob + (s/S) log_target), resamples them
    if few are effective, and moves each by one Metropolis-adjusted Langevin step for that density.

        x = tfj.sample(flow, variables, noise)
        moved = tfj.anneal(flow, variables, lambda x: -energy(x), x, key=key)
        mean_energy = jax.nn.softmax(moved.log_weights) @ energy(moved.samples)

    Args:
      log_target: from [b, T, D] to [b], in nats, up to a constant; differentiable, and of the same
        coordinates as the flow (see `Standardize`). The same function in a second call spares it
        the compilation.
      samples: [B, T, D] or images, drawn from the flow without guidance.
      condition: of the samples, as for `log_prob`.
      steps: S; 1 is importance sampling with one move behind it.
      step_size: h of the first move, x + h gradient + sqrt(2 h) noise. Later ones adapt it to an
        acceptance of 0.574.
      resample_below: the share of effective samples below which they are resampled; 0 never does,
        which is annealed importance sampling.
      keep: None takes the S equal steps above. A number below 1, such as 0.95, makes each step as
        long as leaves this share of the samples effective in that step. Energies of particles that
        nearly overlap need it: their first steps must be short. The last step reaches the target in
        any case; steps behind the target only move the samples, and need no network.
      batch_size: samples in one network call, which bounds the memory.
    Raises:
      ValueError: if the arguments do not fit the flow, or if no sample has a finite log_target.
    """
    flow.check_examples(samples)
    for name, value in (('steps', steps), ('batch_size', batch_size)):
        if value < 1:
            raise ValueError(f'{name} {value} must be at least 1.')
    if not 0 < step_size < math.inf:
        raise ValueError(f'step_size {step_size} must be a finite number above 0.')
    if not 0 <= resample_below <= 1:
        raise ValueError(f'resample_below {resample_below} must be between 0 and 1.')
    if keep is not None and not 0 < keep < 1:
        raise ValueError(
            f'keep {keep} must be a share between 0 and 1, such as 0.95; None takes equal steps.'
        )
    samples = jnp.asarray(samples)
    condition = conditions.check_condition(flow, condition, samples.shape[0])
    condition = conditions.per_example(condition, samples.shape[0])
    found = jax.eval_shape(log_target, samples)
    if found.shape != samples.shape[:1]:
        raise ValueError(
            f'log_target gives {found.shape} for samples {samples.shape}; it must give one number '
            f'for each sample, {samples.shape[:1]}.'
        )
    annealed = _anneal(
        flow, log_target, steps, min(batch_size, samples.shape[0]), variables, samples, condition,
        key, step_size, resample_below, keep,
    )
    if not isinstance(samples, jax.core.Tracer) and not jnp.isfinite(annealed.log_normalizer):
        raise ValueError(
            'log_target is not finite at any of the samples; give it in nats, of the coordinates '
            'of the flow.'
        )
    return annealed


class _Point(NamedTuple):
    """Samples [B, ...] with both log densities [B] and their gradients [B, ...]."""

    x: Array
    flow: Array
    target: Array
    flow_gradient: Array
    target_gradient: Array

    def log_ratio(self) -> Array:
        """log_target - log_prob; -inf where the target is not finite."""
        ratio = self.target - self.flow
        return jnp.where(jnp.isfinite(ratio), ratio, -jnp.inf)

    def between(self, time) -> tuple[Array, Array]:
        """The log density at `time` in [0, 1] from flow to target, and its gradient."""
        gradient = (1 - time) * self.flow_gradient + time * self.target_gradient
        return (1 - time) * self.flow + time * self.target, gradient


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _anneal(
    flow, log_target, steps, batch_size, variables, samples, condition, key, step_size,
    resample_below, keep,
) -> Annealed:
    count = samples.shape[0]
    evaluate = _evaluator(flow, log_target, batch_size, variables)

    def step(carry, planned):
        point, condition, ancestors, log_weights, log_normalizer, before, log_step, key = carry
        key, resample_key, move_key = jax.random.split(key, 3)
        time = planned
        if keep is not None:
            longest = _longest_step(point.log_ratio(), log_weights, 1 - before, keep)
            time = jnp.where(planned < 1, before + longest, 1.0)
        # Not 0 times -inf where the target is reached already.
        log_weights += jnp.where(time > before, (time - before) * point.log_ratio(), 0)
        effective = effective_sample_size(log_weights) / count

        def resampled():
            index = _systematic(resample_key, log_weights)
            rows = jax.tree.map(lambda a: a[index], (point, condition, ancestors))
            mean = jax.nn.logsumexp(log_weights) - math.log(count)
            return *rows, jnp.zeros_like(log_weights), log_normalizer + mean

        point, condition, ancestors, log_weights, log_normalizer = jax.lax.cond(
            effective < resample_below, resampled,
            lambda: (point, condition, ancestors, log_weights, log_normalizer),
        )
        point, accepted = _move(move_key, point, condition, time, jnp.exp(log_step), evaluate)
        log_step = log_step + accepted - TARGET_ACCEPTANCE
        carry = (point, condition, ancestors, log_weights, log_normalizer, time, log_step, key)
        return carry, (effective, accepted, time)

    planned = jnp.arange(1, steps + 1) / steps
    start = (
        evaluate(samples, condition), condition, jnp.arange(count), jnp.zeros(count),
        jnp.zeros(()), jnp.zeros(()), jnp.log(step_size), key,
    )
    end, (effective, acceptance, times) = jax.lax.scan(step, start, planned)
    point, _, ancestors, log_weights, log_normalizer = end[:5]
    mean = jax.nn.logsumexp(log_weights) - math.log(count)
    return Annealed(
        point.x, log_weights, log_normalizer + mean, ancestors, effective, acceptance, times
    )


def _longest_step(log_ratio, log_weights, longest, keep):
    """The step up to `longest` that leaves the share `keep` effective, of samples of any weight."""
    alive = jnp.isfinite(log_ratio)  # others lose their weight in a step of any length
    log_ratio = jnp.where(alive, log_ratio, 0)
    weights = jax.nn.softmax(jnp.where(alive, log_weights, -jnp.inf))

    def effective(step):
        gain = step * log_ratio
        gain = jnp.exp(gain - jnp.max(gain, where=weights > 0, initial=-jnp.inf))
        return jnp.square(weights @ gain) / (weights @ jnp.square(gain))

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = effective(longest * jnp.exp(middle)) >= keep
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # By the logarithm: steps are as short as the energies are high.
    low, high = jax.lax.fori_loop(0, 30, halve, (jnp.full((), -80.0), jnp.zeros(())))
    return longest * jnp.where(effective(longest) >= keep, 1, jnp.exp(high))


def _evaluator(flow, log_target, batch_size: int, variables) -> Callable[[Array, Any], _Point]:
    """A function of samples [B, ...] and their condition, which takes `batch_size` at a time.

    Given a point, it takes the density of the flow from there and spares the network.
    """

    def evaluate_batch(batch) -> _Point:
        x, condition, known = batch

        def with_gradient(log_density):
            def total(x):
                values = log_density(x)
                return values.sum(), values

            (_, values), gradient = jax.value_and_grad(total, has_aux=True)(x)
            return values, gradient

        target_values, target_gradient = with_gradient(log_target)
        if known is not None:
            return known._replace(x=x, target=target_values, target_gradient=target_gradient)
        flow_values, flow_gradient = with_gradient(
            lambda x: log_prob(flow, variables, x, condition)
        )
        return _Point(x, flow_values, target_values, flow_gradient, target_gradient)

    def evaluate(x: Array, condition, known: _Point | None = None) -> _Point:
        count = x.shape[0]
        index = jnp.arange(-(-count // batch_size) * batch_size) % count
        batches = jax.tree.map(
            lambda a: a[index].reshape(-1, batch_size, *a.shape[1:]), (x, condition, known)
        )
        found = jax.lax.map(evaluate_batch, batches)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:count], found)

    return evaluate


def _move(key, point: _Point, condition, time, step_size, evaluate) -> tuple[_Point, Array]:
    """One Metropolis-adjusted Langevin move; returns the samples and the share that moved."""
    noise_key, test_key = jax.random.split(key)
    axes = tuple(range(1, point.x.ndim))

    def step_log_prob(start, gradient, end):  # without its constant, which cancels
        return -jnp.square(end - start - step_size * gradient).sum(axes) / (4 * step_size)

    before, gradient = point.between(time)
    noise = jax.random.normal(noise_key, point.x.shape)
    x = point.x + step_size * gradient + jnp.sqrt(2 * step_size) * noise
    proposed = jax.lax.cond(
        time < 1, lambda: evaluate(x, condition), lambda: evaluate(x, condition, point)
    )
    after, gradient_after = proposed.between(time)
    log_ratio = after + step_log_prob(x, gradient_after, point.x)
    log_ratio -= before + step_log_prob(point.x, gradient, x)
    # Comparison with NaN is False: what is not finite is rejected.
    accept = jnp.log(jax.random.uniform(test_key, before.shape)) < log_ratio

    def choose(new, old):
        return jnp.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, proposed, point), accept.mean()


def _systematic(key, log_weights: Array) -> Array:
    """Systematic resampling: indices [B], each as often as its weight says, rounded up or down."""
    count = log_weights.size
    edges = jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jnp.arange(count) + jax.random.uniform(key)) / count
    return jnp.minimum(jnp.searchsorted(edges, points * edges[-1]), count - 1)
