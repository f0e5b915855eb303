"""The sampler: noise to images, one patch after another, with a preallocated key/value cache.

Shape suffixes: B images, T patches, D numbers in a patch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.guidance import Guidance, guide
from tarflow_jax.flow.layers import Layer, LayerCache, empty_cache
from tarflow_jax.flow.likelihood import prior_variance
from tarflow_jax.flow.model import Block, TarFlow, check_labels, flip_if, unpatchify

METHODS = ('sequential',)
MAX_REDRAWS = 10


class SampleInfo(NamedTuple):
    """What happened while sampling: `redraws` [B] int32, how often each image was drawn again."""

    redraws: np.ndarray


def sample(
    model: TarFlow,
    variables,
    noise: Array,
    labels: Array | None = None,
    *,
    guidance: Guidance | None = None,
    method: str = 'sequential',
    key: Array | None = None,
    return_info: bool = False,
):
    """Images from noise: the inverse of the flow, with guidance.

    Args:
      noise: [B, T, D] standard normal.
      labels: int32 [B], -1 for none, or None.
      guidance: None is unguided.
      method: 'sequential', exact, T network calls in a row per block.
      key: if given, an image that is not finite is drawn again by itself from fresh noise of this
        key, up to 10 times. Without a key nothing is looked at on the host, and the call may stand
        inside `jax.jit`.
      return_info: also return a `SampleInfo`.
    Returns:
      images [B, H, W, C] float32, or (images, info).
    Raises:
      ValueError: if the arguments do not fit the model or each other.
    """
    guidance = _checked(model, noise, labels, guidance, method)
    images = _draw(model, variables, noise, labels, guidance)
    redraws = np.zeros(noise.shape[0], np.int32)
    if key is not None:
        images, redraws = _redraw_failed(model, variables, images, labels, guidance, key, redraws)
    return (images, SampleInfo(redraws)) if return_info else images


def sample_trajectory(
    model: TarFlow,
    variables,
    noise: Array,
    labels: Array | None = None,
    *,
    guidance: Guidance | None = None,
) -> list[Array]:
    """The way from noise to images: the noise, then the output of each block in order of sampling.

    Arguments as for `sample`. Returns len(layers_per_block) + 1 arrays [B, T, D]; `unpatchify`
    makes pictures of them.
    """
    guidance = _checked(model, noise, labels, guidance, 'sequential')
    return _trajectory(model, variables, noise, labels, guidance)


def _checked(model, noise, labels, guidance, method) -> Guidance | None:
    expected = (model.num_patches, model.patch_dim)
    if noise.ndim != 3 or noise.shape[1:] != expected:
        raise ValueError(f'noise has shape {noise.shape}, this flow takes [B, {expected}].')
    check_labels(model.num_classes, labels, noise.shape[0])
    if method not in METHODS:
        raise ValueError(f'sampling method {method!r} is none of {", ".join(METHODS)}.')
    if guidance is None or guidance.weight == 0:
        return None
    guidance.check(has_labels=model.num_classes > 0 and labels is not None)
    return guidance


def _draw(model, variables, noise, labels, guidance) -> Array:
    x_BxTxD = _trajectory(model, variables, noise, labels, guidance)[-1]
    return unpatchify(x_BxTxD, model.patch_size, model.image_size)


def _trajectory(model, variables, noise, labels, guidance) -> list[Array]:
    x = noise * jnp.sqrt(prior_variance(variables))
    sequences = [noise]
    rule = weights = None
    temperature = 1.0
    if guidance is not None:
        rule = (guidance.target, guidance.rule)
        weights = guidance.weights(model.num_patches)
        temperature = guidance.temperature
    for b in reversed(range(len(model.layers_per_block))):
        params = variables['params'][f'block_{b}']
        block = model.block_module(b)
        # reverse is traced: blocks of the same depth are one compiled program.
        reverse = np.bool_(b % 2)
        x, _ = invert_block(block, rule, params, x, labels, reverse, weights, temperature)
        sequences.append(x)
    return sequences


@partial(jax.jit, static_argnums=(0, 1))
def invert_block(block: Block, rule, params, z_BxTxD, labels, reverse, weights, temperature):
    """The inverse of one block: x_t = z_t * exp(a_t) + m_t, t = 0..T-1 in the block's order.

    Args:
      rule: (target, rule) of the guidance, or None for unguided, when `weights` is None.
      z_BxTxD: in raster order, as is the result.
      weights: [T - 1], of the guidance at each generated position.
    Returns:
      x [B, T, D], and the inverse's log-determinant [B] in nats, sum over t, d of a.
    """
    B, T, _ = z_BxTxD.shape
    place = block.layout.place
    params = block.layout.gather(params)
    z = flip_if(reverse, z_BxTxD, 1)
    positions = flip_if(reverse, params['position_embedding'], 0)
    branches = 1 if rule is None else 2
    batch = B * branches
    if branches == 2:
        # Both branches run as one batch, side by side so that they are on the same device: the
        # conditional one of each image, then the unconditional.
        given = jnp.full(B, -1) if labels is None else labels
        labels = jnp.stack([given, jnp.full(B, -1)], 1).reshape(batch)
        conditional = jnp.arange(batch)[:, None, None, None] % 2 == 0
        temperature = jnp.where(conditional, 1.0, temperature)

    layer = Layer(block.width, block.head_dim, block.dtype, block.layout)
    # Unstacked outside of the scan: inside, each step would copy every layer's weights.
    layers = [jax.tree.map(lambda a: a[i], params['layers']) for i in range(block.num_layers)]
    empty = empty_cache(batch, layer.heads, T, block.head_dim, block.dtype)
    caches = [LayerCache(*(place(x, 'heads') for x in empty)) for _ in range(block.num_layers)]

    def step(carry, inputs):
        x_BxD, caches, logdet_B = carry
        t, z_next_BxD, position_C, weight = inputs
        x = jnp.repeat(x_BxD, branches, axis=0)[:, None]
        h = block.apply({'params': params}, x, position_C, labels, method='embed')
        new_caches = []
        for layer_params, cache in zip(layers, caches):
            h, cache = layer.apply({'params': layer_params}, h, temperature, cache, t)
            new_caches.append(cache)
        log_scale, shift = block.apply({'params': params}, h, method='predict')
        both = [x.reshape(B, branches, -1) for x in (log_scale, shift)]
        log_scale, shift = (x[:, 0] for x in both)
        if branches == 2:
            log_scale, shift = guide(*rule, weight, (log_scale, shift), [x[:, 1] for x in both])
        x_next_BxD = z_next_BxD * jnp.exp(log_scale) + shift
        return (x_next_BxD, new_caches, logdet_B + log_scale.sum(1)), x_next_BxD

    first, logdet = z[:, 0], jnp.zeros(B, z.dtype)
    inputs = (jnp.arange(T - 1), z[:, 1:].swapaxes(0, 1), positions[:-1], weights)
    (_, _, logdet), rest = jax.lax.scan(step, (first, caches, logdet), inputs)
    x = place(jnp.concatenate([first[None], rest]).swapaxes(0, 1), 'tokens')
    return flip_if(reverse, x, 1), logdet


def _redraw_failed(model, variables, images, labels, guidance, key, redraws):
    """Draws the images that are not finite again, only those, each from noise of its own."""
    labels = None if labels is None else model.layout.to_host(labels)
    for attempt in range(MAX_REDRAWS):
        finite = model.layout.to_host(jnp.isfinite(images).all((1, 2, 3)))
        failed = np.flatnonzero(~finite)
        if not failed.size:
            break
        # Padded to a power of two, so that few batch sizes are ever compiled.
        rows = np.resize(failed, 1 << (failed.size - 1).bit_length())
        noise = _redrawn_noise(model, key, attempt, rows)
        drawn = _draw(model, variables, noise, None if labels is None else labels[rows], guidance)
        images = images.at[failed].set(drawn[: failed.size])
        redraws[failed] += 1
    return images, redraws


@partial(jax.jit, static_argnums=0)
def _redrawn_noise(model: TarFlow, key, attempt, rows) -> Array:
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, attempt), row))(rows)
    shape = (model.num_patches, model.patch_dim)
    return model.layout.place(jax.vmap(lambda k: jax.random.normal(k, shape))(keys), 'tokens')
