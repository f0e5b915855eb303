"""Flows small enough for every test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.flow.parameters import is_parameter

TINY = dict(image_size=8, image_channels=2, patch_size=2, width=32, head_dim=16, num_classes=3)
SEQUENCE = dict(length=4, token_dim=2, width=8, head_dim=4, layers_per_block=(1, 1))
# What a condition can hold, all at once.
CONDITIONED = dict(num_classes=3, num_features=2, noise_conditioned=True)
# Orders of two blocks of four tokens that are neither raster nor reversed.
PERMUTED = ((2, 0, 3, 1), (1, 2, 0, 3))


def tiny(layers_per_block=(2, 1), **fields):
    return tfj.TarFlow(**{**TINY, 'layers_per_block': layers_per_block, **fields})


def sequence_flow(**fields):
    """Over sequences of four tokens of two numbers."""
    return tfj.SequenceFlow(**{**SEQUENCE, **fields})


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=('method',))
def apply(model, variables, images, labels=None, method=None):
    """model.apply, compiled: run step by step, a loop over layers compiles anew at every call."""
    return model.apply(variables, images, labels, method=method)


@functools.cache
def perturbed(model, key=0, amount=0.05):
    """Random variables whose flow is far from the identity it starts as; nothing is compiled."""
    rng = np.random.default_rng(key)

    def one(p):
        start = {
            'ones': lambda: 1.0,
            'zeros': lambda: 0.0,
            'uniform': lambda: p.scale * rng.uniform(-1, 1, p.shape),
            'normal': lambda: p.scale * rng.standard_normal(p.shape),
        }[p.init]()
        return jnp.asarray(start + amount * rng.standard_normal(p.shape), jnp.float32)

    variables = {'params': jax.tree.map(one, model.parameters(), is_leaf=is_parameter)}
    if model.volume_preserving:
        variables['prior'] = {'variance': jnp.ones(model.token_shape, jnp.float32)}
    return variables


def wide(tree):
    """A tree in float64, for the time that it is enabled."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x,
        tree,
    )


def batch(model, count=3, key=7):
    return normal(key, count, *model.example_shape), jnp.arange(count) % 3 - 1


def noise_for(model, count=3, key=3):
    return normal(key, count, *model.token_shape)


def condition_for(model, count=3, key=5, per_token=True):
    """Whatever the flow can be conditioned on; the first example has neither class nor features."""
    rng = np.random.default_rng(key)
    shape = (count, *((model.token_shape[0],) if per_token else ()), model.num_features)
    features = jnp.asarray(rng.standard_normal(shape), jnp.float32).at[0].set(jnp.nan)
    return tfj.Condition(
        labels=jnp.arange(count) % (model.num_classes + 1) - 1 if model.num_classes else None,
        noise_std=jnp.linspace(0.1, 0.9, count) if model.noise_conditioned else None,
        features=features if model.num_features else None,
    )


def normal(key, *shape):
    return jnp.asarray(np.random.default_rng(key).standard_normal(shape), jnp.float32)
