"""The Bayes classifier, against a flow that knows the answer and against the likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_flow import tiny
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation.classification import class_log_probs, classification
from tarflow_jax.training import sharding
from tarflow_jax.training.step import Recipe, add_noise

MODEL = tiny((1,))
RECIPE = Recipe(noise_std=0.05, ema_decay=0.0)
KEY = jax.random.key(1)


def score(variables, source, draws=1, recipe=RECIPE, batch_size=8):
    return classification(
        MODEL, variables, source, recipe=recipe, mesh=sharding.make_mesh(), batch_size=batch_size,
        key=KEY, draws=draws,
    )


def grey(labels):
    """Images of three brightnesses, one for each class."""
    pixels = np.array([40, 128, 215], np.uint8)[labels]
    images = np.broadcast_to(pixels[:, None, None, None], (len(labels), 8, 8, 2))
    return InMemory(np.ascontiguousarray(images), labels.astype(np.int32))


def flow_that_expects_grey():
    """Without layers that do anything, shift and scale depend on the class alone."""
    params = jax.tree.map(jnp.zeros_like, random_variables(MODEL)['params'])
    block = params['block_0']
    block['class_embedding'] = 8.0 * jnp.eye(3, MODEL.width)
    kernel = np.zeros(block['proj_out']['kernel'].shape, np.float32)
    kernel[:3, 8:] = np.array([40, 128, 215])[:, None] / 127.5 - 1
    block['proj_out']['kernel'] = jnp.asarray(kernel / 8.0)
    return {'params': params}


def test_flow_that_knows_the_classes():
    labels = np.arange(20) % 3
    found = score(flow_that_expects_grey(), grey(labels))
    assert found == {'accuracy': 1.0, 'images': 20}


def test_share_of_right_answers_leaves_padding_out():
    # 20 images in batches of 8. Five labels are wrong, one of them that of the last image, which
    # is also what fills up the last batch.
    labels = np.arange(20) % 3
    source = grey(labels)
    source.label_N[[0, 3, 7, 11, 19]] = (labels[[0, 3, 7, 11, 19]] + 1) % 3
    assert score(flow_that_expects_grey(), source) == {'accuracy': 0.75, 'images': 20}


def test_log_probs_are_those_of_the_likelihood():
    variables = random_variables(MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 2), np.uint8)
    found = class_log_probs(MODEL, RECIPE, variables, pixels, KEY)
    noisy = add_noise(KEY, pixels, RECIPE)
    wanted = [tfj.log_prob(MODEL, variables, noisy, np.full(4, y)) for y in range(3)]
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found, np.stack(wanted, 1), rtol=1e-5)
    assert np.ptp(np.asarray(found), axis=1).min() > 0.01


def test_draws_are_averaged():
    # Brightnesses between the classes, and so much noise that single draws disagree about some.
    recipe = Recipe(noise_std=0.9, ema_decay=0.0)
    variables = flow_that_expects_grey()
    brightness = np.random.default_rng(0).integers(60, 200, (64, 1, 1, 1), np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(brightness, (64, 8, 8, 2)))
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, draw), 0) for draw in range(3)]
    draws = np.stack([class_log_probs(MODEL, recipe, variables, pixels, key) for key in keys])
    labels = draws.mean(0).argmax(1)
    assert all((draw.argmax(1) != labels).any() for draw in draws)
    found = score(variables, InMemory(pixels, labels), draws=3, recipe=recipe, batch_size=64)
    assert found == {'accuracy': 1.0, 'images': 64}
