"""What training and scoring do to 8-bit images, against the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.training import corruption
from tarflow_jax.training.corruption import (
    LEVELS,
    NOISES,
    WEIGHTS,
    Recipe,
    condition_of,
    corrupt,
    corrupt_each,
)

KEY = jax.random.key(3)
LEVELLED = Recipe('levels', noise_std=0.5, lowest_noise_std=0.1, weight='square')


def pixels(count=64, shape=(8, 8, 2)):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def test_unit_range_has_both_ends():
    found = corruption.to_unit_range(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(found, [-1, -0.6, 1], atol=1e-6)


def test_dequantization_fills_the_cells_of_the_pixel_values():
    values = np.repeat(np.array([0, 100, 255], np.uint8), 2000).reshape(3, -1, 1, 1)
    x = np.asarray(corruption.dequantize(jax.random.key(0), values), np.float64)
    for value, cell in zip((0, 100, 255), x):
        u = (cell + 1) * 128 - value
        assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
        assert abs(u.mean() - 0.5) < 0.03
    assert -1 <= x.min() and x.max() < 1


def test_uniform_noise_is_dequantization():
    found = corrupt(KEY, pixels(), Recipe('uniform'))
    np.testing.assert_array_equal(found.images, corruption.dequantize(KEY, pixels()))
    assert found.noise_std is None and found.weight is None


def test_gaussian_noise_has_the_given_standard_deviation():
    images, level, weight = corrupt(KEY, pixels(), Recipe('gaussian', noise_std=0.07))
    noise = np.asarray(images) - (pixels() / 127.5 - 1)
    assert abs(noise.mean()) < 4 * 0.07 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(0.07, rel=4 / np.sqrt(2 * noise.size))
    neighbours = np.corrcoef(noise.ravel()[:-1], noise.ravel()[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(noise.size)
    assert level is None and weight is None


def test_each_image_has_noise_of_its_level():
    images, level, weight = corrupt(KEY, pixels(), LEVELLED)
    assert images.dtype == level.dtype == weight.dtype == jnp.float32
    assert level.shape == weight.shape == (64,)
    assert 0.1 <= level.min() < 0.15 and 0.45 < level.max() <= 0.5
    noise = np.asarray(images) - (pixels() / 127.5 - 1)
    ratio = noise.reshape(64, -1).std(1) / level
    assert abs(ratio - 1).max() < 5 / np.sqrt(2 * 128)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 4 / np.sqrt(128)
    np.testing.assert_allclose(weight, np.square(level), rtol=1e-6)


@pytest.mark.parametrize('name, cdf', [
    ('uniform', lambda t: (t - 0.1) / 0.4),
    ('uniform_square', lambda t: (t**2 - 0.01) / 0.24),
    ('log_normal', lambda t: 0.5 * (1 + jax.lax.erf((jnp.log(t) + 1.2) / np.sqrt(2)))),
])
def test_distributions_of_levels(name, cdf):
    found = jnp.sort(LEVELS[name](KEY, (4000,), 0.1, 0.5))
    # Kolmogorov and Smirnov: more than 1.63 / sqrt(n) has a probability of 1%.
    steps = (jnp.arange(4000) + 0.5) / 4000
    assert abs(cdf(found) - steps).max() < 1.63 / np.sqrt(4000)


@pytest.mark.parametrize('name, wanted', [
    ('one', [1, 1]), ('level', [0.2, 0.4]), ('level_normalized', [0.2 / 0.6, 0.4 / 0.6]),
    ('square', [0.04, 0.16]), ('square_normalized', [0.04 / 0.26, 0.16 / 0.26]),
])
def test_weights(name, wanted):
    found = WEIGHTS[name](jnp.array([0.2, 0.4]), 0.1, 0.5)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_every_choice_is_tested_above():
    assert list(NOISES)[:3] == ['gaussian', 'uniform', 'levels']
    assert set(LEVELS) == {'uniform', 'uniform_square', 'log_normal'}
    assert set(WEIGHTS) == {'one', 'level', 'level_normalized', 'square', 'square_normalized'}


@pytest.mark.parametrize('recipe', [Recipe(), Recipe('uniform'), LEVELLED], ids=lambda r: r.noise)
class TestKeys:
    def test_noise_is_a_function_of_the_key(self, recipe):
        one, same = (corrupt(KEY, pixels(4), recipe) for _ in range(2))
        jax.tree.map(np.testing.assert_array_equal, one, same)
        other = corrupt(jax.random.key(4), pixels(4), recipe)
        jax.tree.map(lambda a, b: np.testing.assert_array_less(0, abs(a - b).max()), one, other)

    def test_each_image_may_have_a_key_of_its_own(self, recipe):
        keys = jax.random.split(KEY, 4)
        found = corrupt_each(keys, pixels(4), recipe)
        assert found.images.shape == (4, 8, 8, 2)
        for i in (1, 3):
            alone = corrupt(keys[i], pixels(4)[i : i + 1], recipe)
            jax.tree.map(
                lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], atol=1e-6), found, alone
            )
        # It does not depend on the others of the batch.
        fewer = corrupt_each(keys[1:3], pixels(4)[1:3], recipe)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[1:3], b, atol=1e-6), found, fewer
        )


def test_a_flow_gets_the_part_of_a_batch_that_it_looks_at():
    batch = {'label': np.arange(3), 'features': np.ones((3, 2), np.float32)}
    everything = sequence_flow(num_classes=3, num_features=2, noise_conditioned=True)
    found = condition_of(everything, batch, jnp.ones(3))
    np.testing.assert_array_equal(found.labels, [0, 1, 2])
    assert found.features is batch['features'] and found.noise_std.shape == (3,)
    assert condition_of(sequence_flow(), batch, jnp.ones(3)) == tfj.Condition()
    # A source without features serves flows without them.
    assert condition_of(tiny((1,)), {'label': np.arange(3)}).features is None
    assert condition_of(sequence_flow(num_features=2), batch).labels is None


def test_noise_that_samples_keep():
    assert Recipe(noise_std=0.2).gaussian_noise_std == 0.2
    assert Recipe('uniform').gaussian_noise_std == 0
    assert LEVELLED.gaussian_noise_std == 0.5


@pytest.mark.parametrize('fields, says', [
    ({'noise': 'pink'}, "noise 'pink' is none of gaussian, uniform, levels"),
    ({'levels': 'few'}, "levels 'few' is none of uniform, uniform_square, log_normal"),
    ({'weight': 'cubic'}, "weight 'cubic' is none of one, level, "),
    ({'noise_std': -0.1}, 'noise_std -0.1 must be at least 0 and below 1'),
    ({'noise_std': float('nan')}, 'noise_std nan'),
    ({'noise': 'levels', 'lowest_noise_std': 0.0}, 'lowest_noise_std 0.0 must be above 0 and below'),
    ({'noise': 'levels', 'noise_std': 0.01}, 'lowest_noise_std 0.01 must be above 0 and below noise_std 0.01'),
    ({'label_dropout': 1.0}, 'label_dropout 1.0'),
    ({'ema_decay': 1.0}, 'ema_decay 1.0'),
    ({'accumulation': 0}, 'accumulation 0 must be at least 1'),
])
def test_recipe_refuses(fields, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**fields)
