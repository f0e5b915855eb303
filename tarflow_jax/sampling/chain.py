"""Markov chains over the unknown part of examples: Hamiltonian Monte Carlo on a flow's density.

The density is exact, and so is its gradient, so the accept step makes p(unknown | known) the
chain's stationary distribution. With one leapfrog step this is the Metropolis-adjusted Langevin
algorithm (Roberts and Tweedie, 1996); with several, see Neal, arXiv 1206.1901.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.flow import Flow
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.sampling.guided import guided_log_prob

# The mean acceptance that step sizes are adapted to: of one leapfrog step, and of several.
ONE_STEP, SEVERAL_STEPS = 0.574, 0.7
FIRST_STEP_SIZE = 0.05
ADAPTATION = 2.0  # of the logarithm of the step size, at first; it falls as i^-0.6
# Each proposal varies its step size by this share, so that no chain runs in a closed orbit.
JITTER = 0.2


class Chains(NamedTuple):
    """The state of the chains, one for each example.

    Args:
      x: [B, ...], where they are.
      log_prob: [B], nats.
      gradient: [B, ...], of log_prob; 0 where examples are known.
      log_step_size: [B].
      accepted: int32 [B], proposals accepted since the burn-in.
    """

    x: Array
    log_prob: Array
    gradient: Array
    log_step_size: Array
    accepted: Array


@partial(jax.jit, static_argnums=0)
def run(
    model: Flow, variables, key: Array, x: Array, known: Array, condition,
    guidance: list[GuidanceParams], steps, leapfrog,
) -> Chains:
    """Runs a chain from each example; the first half of the steps adapts the step sizes.

    Args:
      x: [B, ...], where the chains start.
      known: bool [B, ...], True where x stays.
      guidance: of each block, by index.
      steps: proposals; a number, may be traced.
      leapfrog: steps of each proposal, each with a forward and a backward pass; may be traced.
    """
    batch, axes = x.shape[0], tuple(range(1, x.ndim))
    target = jnp.where(leapfrog == 1, ONE_STEP, SEVERAL_STEPS)
    burn_in = steps // 2

    def per_example(a: Array) -> Array:
        return a.reshape(batch, *[1] * (x.ndim - 1))

    def density(x: Array) -> tuple[Array, Array]:
        def total(x):
            log_prob = guided_log_prob(model, variables, x, condition, guidance)
            return log_prob.sum(), log_prob

        (_, log_prob), gradient = jax.value_and_grad(total, has_aux=True)(x)
        return log_prob, jnp.where(known, 0.0, gradient)

    def propose(i, chains: Chains) -> Chains:
        keys = jax.random.split(jax.random.fold_in(key, i), 3)
        momentum = jnp.where(known, 0.0, jax.random.normal(keys[0], x.shape, x.dtype))
        jitter = jax.random.uniform(keys[1], (batch,), minval=1 - JITTER, maxval=1 + JITTER)
        size = per_example(jnp.exp(chains.log_step_size) * jitter)

        def leap(_, carry):
            x, momentum, _, gradient = carry
            momentum = momentum + 0.5 * size * gradient
            x = x + size * momentum
            log_prob, gradient = density(x)
            return x, momentum + 0.5 * size * gradient, log_prob, gradient

        start = (chains.x, momentum, chains.log_prob, chains.gradient)
        new_x, new_momentum, log_prob, gradient = jax.lax.fori_loop(0, leapfrog, leap, start)
        kinetic = 0.5 * (jnp.square(momentum) - jnp.square(new_momentum)).sum(axes)
        log_ratio = log_prob - chains.log_prob + kinetic
        # A proposal where the flow overflows is refused.
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, jnp.minimum(log_ratio, 0.0))
        accepted = jnp.log(jax.random.uniform(keys[2], (batch,))) < log_ratio
        moved = per_example(accepted)
        rate = jnp.where(i < burn_in, ADAPTATION * (1.0 + i) ** -0.6, 0.0)
        return Chains(
            jnp.where(moved, new_x, chains.x),
            jnp.where(accepted, log_prob, chains.log_prob),
            jnp.where(moved, gradient, chains.gradient),
            chains.log_step_size + rate * (jnp.exp(log_ratio) - target),
            chains.accepted + (accepted & (i >= burn_in)),
        )

    chains = Chains(
        x, *density(x), jnp.full(batch, jnp.log(FIRST_STEP_SIZE)), jnp.zeros(batch, jnp.int32)
    )
    return jax.lax.fori_loop(0, steps, propose, chains)
