"""A flow small enough for every test."""

import functools

import jax
import jax.numpy as jnp

import tarflow_jax as tfj

TINY = dict(image_size=8, image_channels=2, patch_size=2, width=32, head_dim=16, num_classes=3)


def tiny(layers_per_block=(2, 1), **fields):
    return tfj.TarFlow(**{**TINY, 'layers_per_block': layers_per_block, **fields})


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=('method',))
def apply(model, variables, images, labels=None, method=None):
    """model.apply, compiled: run step by step, a loop over layers compiles anew at every call."""
    return model.apply(variables, images, labels, method=method)


@functools.cache
def perturbed(model, key=0, amount=0.05):
    """Random variables whose flow is far from the identity it starts as."""
    images = jnp.zeros((1, model.image_size, model.image_size, model.image_channels))
    variables = jax.jit(model.init)(jax.random.key(key), images)
    leaves, tree = jax.tree.flatten(variables['params'])
    keys = jax.random.split(jax.random.key(key + 1), len(leaves))
    leaves = [x + amount * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return {**variables, 'params': jax.tree.unflatten(tree, leaves)}


def batch(model, count=3, key=7):
    shape = (count, model.image_size, model.image_size, model.image_channels)
    return jax.random.normal(jax.random.key(key), shape), jnp.arange(count) % 3 - 1
