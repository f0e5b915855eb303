"""Bits per dimension over a set, against flows whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import tiny
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation.bits_per_dim import bits_per_dim
from tarflow_jax.flow.likelihood import dequantise
from tarflow_jax.training import sharding
from tarflow_jax.training.step import Recipe

MODEL = tiny((1,))
RECIPE = Recipe(noise_std=0.1, ema_decay=0.0)
KEY = jax.random.key(1)


def images(count=20):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 8, 2), np.uint8)
    return InMemory(pixels, (np.arange(count) % 3).astype(np.int32))


def identity(model=MODEL):
    """Variables of the flow z = x: nothing comes out of proj_out."""
    variables = random_variables(model)
    out = variables['params']['block_0']['proj_out']
    variables['params']['block_0']['proj_out'] = jax.tree.map(jnp.zeros_like, out)
    return variables


def score(variables, source, batch_size=8, draws=1, model=MODEL, recipe=RECIPE):
    return bits_per_dim(
        model, variables, source, recipe=recipe, mesh=sharding.make_mesh(), batch_size=batch_size,
        key=KEY, draws=draws,
    )


def normal_bits(x, variance=1.0):
    """Bits per dimension of each image under independent normal distributions, in float64."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    nats = 0.5 * (x**2 / variance + np.log(2 * np.pi * variance)).sum(1)
    return (nats / x.shape[1] + np.log(128)) / np.log(2)


def dequantised(source, batch_size, draw):
    """The images as they are scored: batch i of a draw with a key of its own."""
    noisy = []
    for i, start in enumerate(range(0, len(source), batch_size)):
        rows = np.minimum(np.arange(start, start + batch_size), len(source) - 1)
        key = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, draw), i))[0]
        noisy.append(dequantise(key, source.image_NxHxWxC[rows]))
    return np.concatenate(noisy)[: len(source)]


# 20 images in batches of 8: four of the last one are padding.
@pytest.mark.parametrize('draws', [1, 2])
def test_identity_flow(draws):
    source = images()
    found = score(identity(), source, draws=draws)
    per_image = np.mean(
        [normal_bits(dequantised(source, 8, draw)) for draw in range(draws)], axis=0
    )
    assert found['images'] == 20
    np.testing.assert_allclose(found['bits_per_dim'], per_image.mean(), rtol=1e-5)
    error = per_image.std(ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(found['bits_per_dim_standard_error'], error, rtol=1e-3)
    # Training loss: half of the mean square of x + noise, of variance 0.01.
    x = source.image_NxHxWxC / 127.5 - 1
    count = draws * x.size
    spread = 4 * 0.1 * np.sqrt((x**2).mean() / count) + 4 * 0.005 * np.sqrt(2 / count)
    assert abs(found['loss'] - 0.5 * ((x**2).mean() + 0.01)) < spread


def test_black_images_by_hand():
    # v = 0: x = u / 128 - 1, whose mean square is 1 - 1/128 + 1/(3 * 128^2).
    black = InMemory(np.zeros((64, 8, 8, 2), np.uint8), np.zeros(64, np.int32))
    found = score(identity(), black, batch_size=64)
    square = 1 - 1 / 128 + 1 / (3 * 128**2)
    wanted = (0.5 * square + 0.5 * np.log(2 * np.pi) + np.log(128)) / np.log(2)
    # 8192 uniform numbers move the mean square by 5e-5 at most.
    assert abs(found['bits_per_dim'] - wanted) < 5e-5


def test_padding_does_not_count():
    source = images()
    # Images of padding are copies of the last: a last one of its own makes any leak visible.
    source.image_NxHxWxC[-1] = 0
    variables = identity()
    padded = score(variables, source, batch_size=8)
    whole = score(variables, source, batch_size=40)
    assert whole['images'] == padded['images'] == 20
    # Only the draws of the uniform noise differ.
    assert abs(whole['bits_per_dim'] - padded['bits_per_dim']) < 1e-3
    leaked = normal_bits(dequantised(source, 8, 0))
    assert abs(np.append(leaked, [leaked[-1]] * 4).mean() - leaked.mean()) > 1e-2


def test_labels_are_used():
    source = images()
    variables = random_variables(MODEL)
    found = score(variables, source)
    noisy = dequantised(source, 8, 0)
    wanted = tfj.bits_per_dim(
        tfj.log_prob(MODEL, variables, noisy, source.label_N), MODEL.num_dims
    )
    np.testing.assert_allclose(found['bits_per_dim'], wanted.mean(), rtol=1e-5)
    without = tfj.bits_per_dim(tfj.log_prob(MODEL, variables, noisy), MODEL.num_dims)
    assert abs(without.mean() - wanted.mean()) > 1e-4


def test_prior_variance_counts_for_bits_and_not_for_the_loss():
    model = tiny((1,), volume_preserving=True)
    variables = identity(model)
    variables['prior'] = {'variance': jnp.full((16, 8), 0.25)}
    found = score(variables, images(), model=model, recipe=Recipe(noise='uniform'))
    np.testing.assert_allclose(
        found['bits_per_dim'], normal_bits(dequantised(images(), 8, 0), 0.25).mean(), rtol=1e-5
    )
    x = images().image_NxHxWxC / 127.5 - 1
    assert abs(found['loss'] - 0.5 * (x**2).mean()) < 0.005
