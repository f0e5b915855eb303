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
from tarflow_jax.training import sharding
from tarflow_jax.training.corruption import Recipe, corrupt_each, dequantize

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


def dequantized(source, draw):
    """The images as they are scored: image i of a draw with a key of its own."""
    of_draw = jax.random.fold_in(jax.random.split(KEY)[0], draw)
    keys = jax.vmap(lambda i: jax.random.fold_in(of_draw, i))(jnp.arange(len(source)))
    return np.asarray(jax.vmap(dequantize)(keys, source.image_NxHxWxC))


# 20 images in batches of 8: four of the last one are padding.
@pytest.mark.parametrize('draws', [1, 3])
def test_identity_flow(draws):
    source = images()
    found = score(identity(), source, draws=draws)
    bits = np.stack([normal_bits(dequantized(source, draw)) for draw in range(draws)])
    assert found['images'] == 20 and found['draws'] == draws
    np.testing.assert_allclose(found['bits_per_dim'], bits.mean(), rtol=1e-5)
    error = bits.mean(0).std(ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(found['standard_error_over_images'], error, rtol=1e-3)
    # Training loss: half of the mean square of x + noise, of variance 0.01.
    x = source.image_NxHxWxC / 127.5 - 1
    spread = 4 * 0.1 * np.sqrt((x**2).mean() / x.size) + 4 * 0.005 * np.sqrt(2 / x.size)
    assert abs(found['loss'] - 0.5 * ((x**2).mean() + 0.01)) < spread


def test_several_draws():
    # A narrow normal distribution: the draws differ by nats, and their mean density by more.
    model = tiny((1,), volume_preserving=True)
    variables = identity(model)
    variables['prior'] = {'variance': jnp.full((16, 8), 1e-5)}
    source = InMemory(np.full((20, 8, 8, 2), 128, np.uint8), np.zeros(20, np.int32))
    found = score(variables, source, draws=4, model=model)
    bits = np.stack([normal_bits(dequantized(source, draw), 1e-5) for draw in range(4)])
    nats = -(bits * np.log(2) - np.log(128)) * 128
    over_draws = bits.mean(1).std(ddof=1) / 2
    np.testing.assert_allclose(found['standard_error_over_draws'], over_draws, rtol=1e-2)
    together = (np.log(128) - np.log(np.exp(nats).mean(0)) / 128) / np.log(2)
    weighted = found['importance_weighted_bits_per_dim']
    np.testing.assert_allclose(weighted, together.mean(), rtol=1e-5)
    error = together.std(ddof=1) / np.sqrt(20)
    np.testing.assert_allclose(
        found['importance_weighted_standard_error_over_images'], error, rtol=1e-2
    )
    assert weighted < found['bits_per_dim'] - 0.01  # Jensen
    assert 'standard_error_over_draws' not in score(variables, source, model=model)


@pytest.mark.parametrize('batch_size', [1, 16, 24])
def test_batch_size_does_not_matter(batch_size):
    variables = random_variables(MODEL)
    found, wanted = (score(variables, images(), size) for size in (batch_size, 8))
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_bfloat16_flow_is_scored_in_float32():
    variables = random_variables(MODEL)
    wanted = score(variables, images())
    assert score(variables, images(), model=tiny((1,), dtype=jnp.bfloat16)) == wanted


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
    np.testing.assert_allclose(whole['bits_per_dim'], padded['bits_per_dim'], rtol=1e-6)
    leaked = normal_bits(dequantized(source, 0))
    assert abs(np.append(leaked, [leaked[-1]] * 4).mean() - leaked.mean()) > 1e-2


def test_labels_are_used():
    source = images()
    variables = random_variables(MODEL)
    found = score(variables, source)
    noisy = dequantized(source, 0)
    wanted = tfj.bits_per_dim(
        tfj.log_prob(MODEL, variables, noisy, source.label_N), MODEL.num_dims
    )
    np.testing.assert_allclose(found['bits_per_dim'], wanted.mean(), rtol=1e-5)
    without = tfj.bits_per_dim(tfj.log_prob(MODEL, variables, noisy), MODEL.num_dims)
    assert abs(without.mean() - wanted.mean()) > 1e-4


def test_noise_conditioned_flow_is_asked_at_its_lowest_level():
    model = tiny((1,), num_features=2, noise_conditioned=True)
    rng = np.random.default_rng(0)
    variables, features = random_variables(model), rng.standard_normal((20, 2)).astype(np.float32)

    class WithFeatures(InMemory):
        def __getitem__(self, i):
            return super().__getitem__(i) | {'features': features[i]}

    source = WithFeatures(images().image_NxHxWxC, images().label_N)
    recipe = Recipe(noise='levels', noise_std=0.5, lowest_noise_std=0.02)
    found = score(variables, source, model=model, recipe=recipe)
    condition = tfj.Condition(source.label_N, np.float32(0.02), features)
    nats = tfj.log_prob(model, variables, dequantized(source, 0), condition)
    wanted = tfj.bits_per_dim(nats, model.num_dims)
    np.testing.assert_allclose(found['bits_per_dim'], wanted.mean(), rtol=1e-5)
    # The loss is that of training: at the level of each image, and weighted with it.
    of_draw = jax.random.fold_in(jax.random.split(KEY)[1], 0)
    keys = jax.vmap(lambda i: jax.random.fold_in(of_draw, i))(jnp.arange(20))
    noisy, levels, weight = corrupt_each(keys, source.image_NxHxWxC, recipe)
    np.testing.assert_array_equal(weight, levels)
    nats = tfj.log_prob(model, variables, noisy, tfj.Condition(source.label_N, levels, features))
    losses = -nats / model.num_dims - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(found['loss'], (weight * losses).mean(), rtol=1e-4)


def test_prior_variance_counts_for_bits_and_not_for_the_loss():
    model = tiny((1,), volume_preserving=True)
    variables = identity(model)
    variables['prior'] = {'variance': jnp.full((16, 8), 0.25)}
    found = score(variables, images(), model=model, recipe=Recipe(noise='uniform'))
    np.testing.assert_allclose(
        found['bits_per_dim'], normal_bits(dequantized(images(), 0), 0.25).mean(), rtol=1e-5
    )
    x = images().image_NxHxWxC / 127.5 - 1
    assert abs(found['loss'] - 0.5 * (x**2).mean()) < 0.005
