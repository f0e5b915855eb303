"""Validation: its numbers by hand, and noise that is the same every time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import tiny
from tiny_state import random_variables

from tarflow_jax.data.sources import InMemory
from tarflow_jax.training import sharding
from tarflow_jax.training.corruption import Recipe
from tarflow_jax.training.validation import described, validate

MODEL = tiny((1,))
RECIPE = Recipe(noise_std=0.1, ema_decay=0.0)
NAMES = [f'validation/{name}' for name in ('loss', 'bits_per_dim', 'train_loss', 'train_bits_per_dim')]


def images(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 2), np.uint8)
    return InMemory(pixels, (np.arange(count) % 3).astype(np.int32))


HELD_OUT, TRAIN = images(12, 0), images(20, 1)


def validated(variables, count=6, held_out=HELD_OUT, train=TRAIN, model=MODEL, seed=3, devices=8,
              batch_size=8):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    variables = jax.device_put(variables, sharding.replicated(mesh))
    return validate(
        model, RECIPE, variables, held_out, train, images=count, seed=seed, mesh=mesh,
        batch_size=batch_size,
    )


def test_the_numbers_of_the_identity_by_hand():
    variables = random_variables(MODEL)
    out = variables['params']['block_0']['proj_out']
    variables['params']['block_0']['proj_out'] = jax.tree.map(jnp.zeros_like, out)
    found = validated(variables)
    assert list(found) == NAMES
    # Every second image of the one and every third of the other set, with the same noise.
    of_run = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 1000), 0)
    keys = [jax.random.fold_in(of_run, i) for i in range(6)]
    noise = np.stack([jax.random.normal(key, (8, 8, 2)) for key in keys])
    u = np.stack([jax.random.uniform(key, (8, 8, 2)) for key in keys])
    for names, source, step in ((NAMES[:2], HELD_OUT, 2), (NAMES[2:], TRAIN, 20 / 6)):
        pixels = source.image_NxHxWxC[[int(i * step) for i in range(6)]].astype(np.float64)
        loss = 0.5 * np.square(pixels / 127.5 - 1 + 0.1 * noise).mean()
        x = 2 * (pixels + u) / 256 - 1
        nats = 0.5 * (x**2 + np.log(2 * np.pi)).mean()
        np.testing.assert_allclose(found[names[0]], loss, rtol=1e-6)
        np.testing.assert_allclose(found[names[1]], nats / np.log(2) + 7, rtol=1e-6)


def test_only_the_parameters_and_the_images_matter():
    variables = random_variables(MODEL)
    found = validated(variables)
    assert validated(variables) == found  # to the bit
    same = validated(variables, count=99, train=HELD_OUT)
    assert list(same.values())[:2] == list(same.values())[2:]
    for other in (
        validated(variables, devices=2, batch_size=3),
        validated(variables, model=MODEL.clone(dtype=jnp.bfloat16)),  # computed in float32
    ):
        np.testing.assert_allclose(list(other.values()), list(found.values()), rtol=1e-6)
    moved = jax.tree.map(lambda x: x + 1e-3, variables)
    for other in (validated(moved), validated(variables, seed=4), validated(variables, count=5)):
        assert all(abs(other[name] - found[name]) > 1e-5 for name in NAMES)


@pytest.mark.parametrize('count, used', [(6, 6), (12, 12), (500, 12)])
def test_described(count, used):
    about = described(RECIPE, HELD_OUT, TRAIN, images=count, seed=3)
    assert about == {
        'dataset': None, 'split': None, 'images': used, 'of': 12, 'seed': 3, 'noise': 'gaussian',
        'noise_std': 0.1, 'lowest_noise_std': 0.01, 'levels': 'uniform', 'weight': 'level',
    }
