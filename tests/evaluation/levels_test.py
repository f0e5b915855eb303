"""Bits per dimension at noise levels, against formulas and `tfj.log_prob`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from tiny_flow import tiny
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation.levels import bits_at_levels, rows
from tarflow_jax.training import sharding

MODEL = tiny((1,), noise_conditioned=True)
KEY = jax.random.key(0)
LEVELS = (0.05, 0.5)


def images(count=20):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 8, 2), np.uint8)
    return InMemory(pixels, (np.arange(count) % 3).astype(np.int32))


@functools.cache
def eps(draw=0, count=20):
    """Image i of a draw has a key of its own."""
    of_draw = jax.random.fold_in(KEY, draw)
    keys = jax.vmap(lambda i: jax.random.fold_in(of_draw, i))(jnp.arange(count))
    return np.asarray(jax.vmap(lambda key: jax.random.normal(key, (8, 8, 2)))(keys), np.float64)


def score(variables, batch_size=8, levels=LEVELS, draws=1, model=MODEL):
    return bits_at_levels(
        model, variables, images(), levels=levels, mesh=sharding.make_mesh(),
        batch_size=batch_size, key=KEY, draws=draws,
    )


def normal_nats(x, variance):
    """Minus the log density of each image under independent normal distributions, per dimension."""
    return 0.5 * (x**2 / variance + np.log(2 * np.pi * variance)).mean((1, 2, 3))


# 20 images in batches of 8: four of the last one are padding.
def test_identity_flow():
    found = score(jax.tree.map(jnp.zeros_like, random_variables(MODEL)), draws=2)
    assert found['levels'] == list(LEVELS) and found['images'] == 20 and found['draws'] == 2
    x = images().image_NxHxWxC / 127.5 - 1
    for i, t in enumerate(LEVELS):
        # z = x: the same eps at all levels, under N(0, 1), and alone under N(0, t^2).
        nats = np.stack([normal_nats(x + t * eps(draw), 1.0) for draw in range(2)]).mean(0)
        noise = np.stack([normal_nats(t * eps(draw), t**2) for draw in range(2)]).mean(0)
        for name, values in (
            ('', (nats + np.log(128)) / np.log(2)), ('image_', (nats - noise) / np.log(2)),
        ):
            error = values.std(ddof=1) / np.sqrt(20)
            np.testing.assert_allclose(found[f'{name}bits_per_dim'][i], values.mean(), rtol=1e-5)
            np.testing.assert_allclose(
                found[f'{name}standard_error_over_images'][i], error, rtol=1e-3
            )
        np.testing.assert_allclose(
            found['noise_bits_per_dim'][i], np.log2(t * np.sqrt(2 * np.pi * np.e)) + 7, rtol=1e-6
        )
    printed = dict(rows(found))
    assert len(printed) == 3
    assert f'{found["bits_per_dim"][1]:.4f}' in printed['bits/dim at noise level 0.5']


def test_it_is_the_density_at_each_level_whatever_the_batch_size():
    variables, source = random_variables(MODEL), images()
    found, again = score(variables), score(variables, batch_size=24)
    for name, value in found.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5)
    for i, t in enumerate(LEVELS):
        noisy = (source.image_NxHxWxC / 127.5 - 1 + t * eps()).astype(np.float32)
        nats = tfj.log_prob(MODEL, variables, noisy, tfj.Condition(source.label_N, np.float32(t)))
        wanted = tfj.bits_per_dim(nats, MODEL.num_dims).mean()
        np.testing.assert_allclose(found['bits_per_dim'][i], wanted, rtol=1e-5)
    # The level and the classes are looked at.
    for condition in (
        tfj.Condition(source.label_N, np.float32(0.2)), tfj.Condition(None, np.float32(LEVELS[1])),
    ):
        other = tfj.log_prob(MODEL, variables, noisy, condition)
        assert abs(tfj.bits_per_dim(other, MODEL.num_dims).mean() - wanted) > 1e-4


def test_bfloat16_flow_is_scored_in_float32():
    variables = random_variables(MODEL)
    assert score(variables, model=MODEL.clone(dtype=jnp.bfloat16)) == score(variables)
