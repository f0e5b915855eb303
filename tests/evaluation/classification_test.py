"""The Bayes classifier, against a flow that knows the answer and against the likelihood."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import tiny
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation.classification import (
    MOST_CONFUSED,
    calibration,
    class_log_probs,
    classification,
    confusion,
)
from tarflow_jax.training import sharding
from tarflow_jax.training.corruption import Recipe, corrupt_each

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
    assert (found['accuracy'], found['images'], found['draws']) == (1.0, 20, 1)
    # Tens of nats apart: it is sure, and right to be.
    assert found['confidence'] > 0.999 and found['calibration_error'] < 1e-3
    assert found['reliability'] == [[found['confidence'], 1.0, 20.0]]


def test_share_of_right_answers_leaves_padding_out():
    # 20 images in batches of 8. Five labels are wrong, one of them that of the last image, which
    # is also what fills up the last batch.
    labels = np.arange(20) % 3
    source = grey(labels)
    source.label_N[[0, 3, 7, 11, 19]] = (labels[[0, 3, 7, 11, 19]] + 1) % 3
    found = score(flow_that_expects_grey(), source)
    assert (found['accuracy'], found['images']) == (0.75, 20)
    np.testing.assert_allclose(found['calibration_error'], 0.25, atol=1e-3)
    np.testing.assert_allclose(found['accuracy_standard_error'], np.sqrt(0.75 * 0.25 / 19))


def test_confusion_counts_the_images_of_each_class_by_the_predicted_one():
    # Class 0 is taken for 0, 2; class 1 for 1; class 2 for 0, 2, 2; nothing has class 3.
    labels = np.array([0, 0, 1, 2, 2, 2])
    log_probs = -np.ones((6, 4))
    log_probs[np.arange(6), [0, 2, 1, 0, 2, 2]] = 0.0
    counts = confusion(log_probs, labels)
    assert counts.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    assert counts.sum(1).tolist() == np.bincount(labels, minlength=4).tolist()

    labels = np.arange(20) % 3
    source = grey(labels)
    source.label_N[[0, 3, 7, 11, 19]] = (labels[[0, 3, 7, 11, 19]] + 1) % 3
    found = score(flow_that_expects_grey(), source)
    matrix = np.array(found['confusion']['counts'])
    assert found['confusion']['classes'] == ['0', '1', '2']
    assert matrix.sum() == 20 and np.trace(matrix) / 20 == found['accuracy']
    assert matrix.sum(1).tolist() == np.bincount(source.label_N, minlength=3).tolist()
    assert MOST_CONFUSED < 1000  # ImageNet's would fill the file with a million numbers


def test_images_without_a_label_are_left_out():
    source = grey(np.arange(20) % 3)
    source.label_N[:5] = -1
    found = score(flow_that_expects_grey(), source)
    assert (found['accuracy'], found['images']) == (1.0, 15)
    source.label_N[:] = -1
    with pytest.raises(ValueError, match='no image of the dataset has one'):
        score(flow_that_expects_grey(), source)


def test_log_probs_are_those_of_the_likelihood():
    variables = random_variables(MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 2), np.uint8)
    keys = jax.random.split(KEY, 4)
    found = class_log_probs(MODEL, RECIPE, variables, {'image': pixels}, keys)
    noisy = corrupt_each(keys, pixels, RECIPE).images
    wanted = [tfj.log_prob(MODEL, variables, noisy, np.full(4, y)) for y in range(3)]
    assert found.shape == (4, 3)
    np.testing.assert_allclose(found, np.stack(wanted, 1), rtol=1e-5)
    assert np.ptp(np.asarray(found), axis=1).min() > 0.01


def test_features_and_noise_levels_are_those_of_the_images():
    model = MODEL.clone(num_features=2, noise_conditioned=True)
    variables = random_variables(model)
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.integers(0, 256, (4, 8, 8, 2), np.uint8),
        'features': rng.standard_normal((4, 2)).astype(np.float32),
    }
    keys = jax.random.split(KEY, 4)
    recipe = Recipe(noise='levels', noise_std=0.5)
    found = class_log_probs(model, recipe, variables, batch, keys)
    noisy, levels, _ = corrupt_each(keys, batch['image'], recipe)
    for y in range(3):
        condition = tfj.Condition(np.full(4, y), levels, batch['features'])
        wanted = tfj.log_prob(model, variables, noisy, condition)
        np.testing.assert_allclose(found[:, y], wanted, rtol=1e-5)
    others = tfj.log_prob(
        model, variables, noisy, tfj.Condition(np.full(4, 2), levels[::-1], batch['features'])
    )
    assert np.abs(found[:, 2] - others).max() > 0.01


def test_draws_are_averaged():
    # Brightnesses between the classes, and so much noise that single draws disagree about some.
    recipe = Recipe(noise_std=0.9, ema_decay=0.0)
    variables = flow_that_expects_grey()
    brightness = np.random.default_rng(0).integers(60, 200, (64, 1, 1, 1), np.uint8)
    pixels = np.ascontiguousarray(np.broadcast_to(brightness, (64, 8, 8, 2)))
    of_draw = [jax.random.fold_in(KEY, draw) for draw in range(3)]
    keys = [jax.vmap(lambda i, key=key: jax.random.fold_in(key, i))(jnp.arange(64)) for key in of_draw]
    draws = np.stack([class_log_probs(MODEL, recipe, variables, {'image': pixels}, k) for k in keys])
    labels = draws.mean(0).argmax(1)
    assert all((draw.argmax(1) != labels).any() for draw in draws)
    found = score(variables, InMemory(pixels, labels), draws=3, recipe=recipe, batch_size=64)
    assert (found['accuracy'], found['images'], found['draws']) == (1.0, 64, 3)


def test_calibration_by_hand():
    # Two classes; the classifier says 0.9 and is right in three of four.
    log_probs = np.log([[0.9, 0.1]] * 8) - 300.0
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    found = calibration(log_probs, labels)
    assert found['accuracy'] == 0.75 and 'top_5_accuracy' not in found
    np.testing.assert_allclose(found['confidence'], 0.9)
    np.testing.assert_allclose(found['calibration_error'], 0.15)
    np.testing.assert_allclose(found['cross_entropy'], -(0.75 * np.log(0.9) + 0.25 * np.log(0.1)))
    # sigmoid(log(9) / temperature) = 0.75 fits three of four, in either half.
    np.testing.assert_allclose(found['temperature'], np.log(9) / np.log(3), rtol=1e-2)
    assert found['calibration_error_at_temperature'] < 2e-3


def test_top_5_of_12_classes():
    log_probs = np.tile(np.arange(12.0), (12, 1))
    found = calibration(log_probs, np.arange(12))
    np.testing.assert_allclose([found['accuracy'], found['top_5_accuracy']], [1 / 12, 5 / 12])
