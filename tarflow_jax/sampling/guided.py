"""The guided flow at all tokens at once: its blocks as maps, and its density.

Shape suffixes: B examples, T tokens, D numbers in a token.
"""

import jax.numpy as jnp

from tarflow_jax.flow.affine import Affine
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.flow import Flow
from tarflow_jax.flow.guidance import GuidanceParams
from tarflow_jax.flow.likelihood import latent_log_prob, prior_variance
from tarflow_jax.flow.order import reorder, restore


def guided_affine(
    model: Flow, variables, index: int, x_BxTxD: Array, *, condition, guidance: GuidanceParams
) -> Affine:
    """The guided map of block `index` at every token, from and in the block's own order."""
    block, params = model.block(index), variables['params'][f'block_{index}']
    condition, temperature = guidance.branch(condition, x_BxTxD.shape[0])
    x = jnp.repeat(x_BxTxD, guidance.branches, axis=0)
    rows = block.affine(params, x, condition, model.block_orders()[index], temperature)
    guided = guidance.combine(rows.map(lambda a: a.transpose(2, 0, 1)), 0)
    return guided.map(lambda a: a.transpose(1, 2, 0))


def guided_trajectory(
    model: Flow, variables, examples: Array, condition, guidance: list[GuidanceParams]
) -> tuple[list[Array], Array]:
    """Maps examples to latents by the guided flow.

    Args:
      guidance: of each block, by index.
    Returns:
      the input of every block and the latents, each [B, T, D] in raster order; logdet [B], nats.
    """
    x = model.to_tokens(examples)
    sequences, logdet = [x], jnp.zeros(x.shape[0], x.dtype)
    for b, order in enumerate(model.block_orders()):
        own = reorder(x, order)
        affine = guided_affine(
            model, variables, b, own, condition=condition, guidance=guidance[b]
        )
        x = restore(affine.forward(own), order)
        sequences.append(x)
        logdet = logdet - affine.log_scale.sum((1, 2))
    return sequences, logdet


def guided_log_prob(
    model: Flow, variables, examples: Array, condition, guidance: list[GuidanceParams]
) -> Array:
    """The log density of examples under the guided flow, [B] in nats."""
    sequences, logdet = guided_trajectory(model, variables, examples, condition, guidance)
    return latent_log_prob(sequences[-1], logdet, prior_variance(variables))
