"""Completion: exact where all blocks read the known tokens first, by chains elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import CONDITIONED, condition_for, normal, perturbed, sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.sampling.completion import is_exact

# Of four tokens both blocks read 0 and 1 first, and then 2 or 3.
ORDERS = ((0, 1, 2, 3), (1, 0, 3, 2))
KNOWN = np.arange(4) < 2


def past_first(**fields):
    return sequence_flow(orders=ORDERS, scale_limit=0.7, **fields)


@pytest.mark.parametrize('fields, guidance', [
    ({'first_token': 'start', **CONDITIONED}, tfj.Guidance(1.5, annealed=True)),
    ({'first_token': 'start', **CONDITIONED}, None),
    ({'volume_preserving': True}, None),
    ({'dtype': jnp.bfloat16}, None),
], ids=['guided', 'conditioned', 'volume_preserving', 'bfloat16'])
def test_completed_with_its_own_noise_a_sample_is_itself(fields, guidance):
    model = past_first(**fields)
    variables, condition = perturbed(model, amount=0.2), condition_for(model)
    if model.volume_preserving:
        variables = variables | {'prior': {'variance': 0.5 + jnp.square(normal(1, 4, 2))}}
    key = jax.random.key(1)
    noise = jax.random.normal(key, (6, 4, 2))[:3]
    x, joint = tfj.sample(
        model, variables, noise, condition, guidance=guidance, return_log_prob=True
    )
    found, log_prob = tfj.complete(
        model, variables, key, np.where(KNOWN[:, None], x, np.nan), KNOWN, condition,
        num_samples=2, guidance=guidance, return_log_prob=True,
    )
    assert found.shape == (2, 3, 4, 2) and log_prob.shape == (2, 3)
    rough = model.dtype == jnp.bfloat16
    np.testing.assert_allclose(found[0], x, atol=0.05 if rough else 1e-5)
    np.testing.assert_array_equal(found[1][:, KNOWN], x[:, KNOWN])
    assert abs(found[1] - x)[:, 2:].min() > 1e-3
    if guidance is None:  # the densities of two futures of one past, up to that of the past
        other = tfj.log_prob(model, variables, found[1], condition)
        np.testing.assert_allclose(
            joint - other, log_prob[0] - log_prob[1], atol=0.1 if rough else 1e-4
        )


def test_each_example_has_a_past_of_its_own():
    # All but a number, half, and nothing are known.
    model = sequence_flow(orders=((3, 1, 0, 2),) * 2, scale_limit=0.7)
    variables, x = perturbed(model, amount=0.2), normal(0, 3, 4, 2)
    known = np.ones((3, 4, 2), bool)
    known[0, 2, 1] = known[1, :3:2] = known[2] = False
    key = jax.random.key(1)
    found, log_prob = tfj.complete(
        model, variables, key, x, known, return_log_prob=True
    )
    np.testing.assert_array_equal(found[known], x[known])
    # The density of the one number, from the joint one along a line.
    line = jnp.linspace(-20, 20, 801)
    joint = tfj.log_prob(model, variables, jnp.tile(found[:1], (801, 1, 1)).at[:, 2, 1].set(line))
    own, wanted = tfj.log_prob(model, variables, found), jnp.full(3, jnp.nan)
    wanted = own[0] - jax.nn.logsumexp(joint) - np.log(40 / 800)
    np.testing.assert_allclose(log_prob[0], wanted, atol=1e-3)
    np.testing.assert_allclose(log_prob[2], own[2], atol=1e-4)
    sample = tfj.sample(model, variables, jax.random.normal(key, x.shape))
    np.testing.assert_allclose(found[2], sample[2], atol=1e-5)


def test_pixels_of_an_image_are_completed():
    # Rows of patches are tokens in a row: the upper half of an image comes first.
    raster = range(16)
    model = tiny((1,), orders=(raster,))
    variables, images = perturbed(model), normal(0, 2, 8, 8, 2)
    upper = np.arange(8)[:, None] < np.full(8, 4)
    found = tfj.complete(model, variables, jax.random.key(0), images, upper, jnp.array([0, -1]))
    np.testing.assert_array_equal(found[:, :4], images[:, :4])
    assert abs(found - images)[:, 4:].min() > 0
    whole = tfj.complete(model, variables, jax.random.key(0), images, upper | True)
    np.testing.assert_array_equal(whole, images)


def test_what_is_exact():
    def exact(model, *places, shape=(1, 4, 2)):
        known = np.zeros(shape, bool)
        for place in places:
            known[(0, *place)] = True
        return is_exact(model, known)

    model = past_first()
    assert exact(model) and exact(model, (0,), (1,)) and exact(model, (0,), (1,), (2,), (3,))
    assert not exact(model, (0,)) and not exact(model, (2,)) and not exact(model, (0,), (2,))
    assert not exact(model, (0,), (1,), (2, 0))  # block 1 reads 3 before 2
    assert not exact(model, (0,), (1,), (2,))
    alike = sequence_flow(orders=((3, 1, 0, 2),) * 2)
    assert exact(alike, (3,), (1, 0)) and not exact(alike, (3,), (1, 0), (0, 1))
    assert not exact(sequence_flow(), (0,)) and exact(sequence_flow())


@pytest.mark.slow
def test_chains_draw_from_the_conditional_density():
    # Two numbers in the middle of a sequence, against their density on a grid.
    model = sequence_flow(num_classes=3, scale_limit=0.7)
    variables, x = perturbed(model, amount=0.2), normal(0, 1, 4, 2)
    known = np.arange(4) != 1
    axis = jnp.linspace(-6, 6, 41)
    points = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    grid = jnp.tile(x, (len(points), 1, 1)).at[:, 1].set(points)
    weight = jax.nn.softmax(tfj.log_prob(model, variables, grid, jnp.full(len(points), 2)))
    mean = weight @ points
    covariance = (points - mean).T @ ((points - mean) * weight[:, None])

    found, info = tfj.complete(
        model, variables, jax.random.key(0), x, known, jnp.array([2]), num_samples=1024, steps=60,
        leapfrog=4, return_info=True,
    )
    np.testing.assert_array_equal(found[:, :, known], jnp.tile(x[:, known], (1024, 1, 1, 1)))
    drawn = found[:, 0, 1]
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(drawn.mean(0) / deviation, mean / deviation, atol=0.1)
    scale = np.outer(deviation, deviation)
    np.testing.assert_allclose(np.cov(drawn.T) / scale, covariance / scale, atol=0.1)
    assert not info.exact and info.acceptance.shape == (1024, 1)
    assert 0.5 < info.acceptance.mean() < 0.9 and (info.step_size > 0).all()


@pytest.mark.parametrize('given, words', [
    ({'known': np.ones((5,), bool)}, r'known has shape \(5,\); for these examples pass \(4,\)'),
    ({'known': np.ones(4)}, 'known is float64; pass bool'),
    ({'known': np.arange(4) == 1, 'return_log_prob': True}, 'read all known tokens before'),
    ({'num_samples': 0}, 'num_samples 0 must be at least 1'),
    ({'steps': 0}, 'steps 0 must be at least 1'),
    ({'denoise': (0.2, 0.1)}, 'several noise levels'),
    ({'guidance': tfj.Guidance(1.0)}, 'labels, features or a temperature'),
])
def test_arguments_that_do_not_fit(given, words):
    model = sequence_flow(orders=ORDERS)
    arguments = {'examples': np.zeros((2, 4, 2), np.float32), 'known': KNOWN, **given}
    with pytest.raises(ValueError, match=words):
        tfj.complete(model, perturbed(model), jax.random.key(0), **arguments)
