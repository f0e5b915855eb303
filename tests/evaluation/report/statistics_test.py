"""What the report measures: neighbours, likelihoods and blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import perturbed, tiny
from tiny_plan import plan_of

from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation.report import statistics
from tarflow_jax.flow import likelihood
from tarflow_jax.training import sharding
from tarflow_jax.training.corruption import corrupt


def source(count, size=8, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, size, size, channels), np.uint8)
    return InMemory(pixels, (np.arange(count) % 3).astype(np.int32), {'images': count})


def test_nearest_is_what_a_search_by_hand_finds():
    train = source(700)  # more than two chunks
    pixels = source(5, seed=1).image_NxHxWxC
    indices, distances = statistics.nearest(pixels, train, 4)
    difference = pixels[:, None].astype(float) - train.image_NxHxWxC[None]
    by_hand = np.sqrt(np.square(difference).mean((2, 3, 4)))
    np.testing.assert_array_equal(indices, np.argsort(by_hand, 1)[:, :4])
    np.testing.assert_allclose(distances, np.sort(by_hand, 1)[:, :4], rtol=1e-5)


@pytest.mark.parametrize('mirrored', [False, True])
def test_copies_are_found(mirrored):
    train = source(300)
    copies = train.image_NxHxWxC[[299, 17]]
    indices, distances = statistics.nearest(copies, train, 1, mirrored)
    assert indices[:, 0].tolist() == [299, 17]
    np.testing.assert_allclose(distances, 0, atol=0.05)
    flipped_indices, flipped = statistics.nearest(copies[:, :, ::-1], train, 1, mirrored)
    if mirrored:
        assert flipped_indices[:, 0].tolist() == [299, 17]
        np.testing.assert_allclose(flipped, 0, atol=0.05)
    else:
        assert flipped.min() > 10


def test_likelihoods_put_the_extremes_first():
    model = tiny()
    variables, mesh = perturbed(model), sharding.make_mesh()
    images = source(20)
    images.image_NxHxWxC[3] = 128  # the flow is near the identity: grey is where its density is
    images.image_NxHxWxC[7] = 255
    bits = statistics.likelihoods(
        model, variables, images, key=jax.random.key(0), mesh=mesh, batch_size=8
    )
    most, least = statistics.extremes(bits, 4)
    assert bits.shape == (20,)
    assert most[0] == np.argmin(bits) == 3 and least[0] == np.argmax(bits) == 7
    assert (np.diff(bits[most]) >= 0).all() and (np.diff(bits[least]) <= 0).all()


def test_extremes_are_apart_and_what_is_not_finite_is_unlikely():
    most, least = statistics.extremes(np.array([3.0, np.nan, 1.0, 2.0, 5.0]), 12)
    assert most.tolist() == [2, 3] and least.tolist() == [1, 4]


def test_blocks_are_those_of_the_forward_pass():
    model = tiny((1, 2, 1))
    variables, mesh = perturbed(model), sharding.make_mesh()
    plan = plan_of(model, noise='uniform')
    images, key = source(5), jax.random.key(3)  # eight devices, so that three are filled up
    found = statistics.blocks(plan, variables, images, key=key, mesh=mesh, count=5)
    padded = np.concatenate([images.image_NxHxWxC, np.zeros((3, 8, 8, 2), np.uint8)])
    noisy = corrupt(key, jnp.asarray(padded), plan.recipe).images[:5]
    sequences, logdet = model.apply(variables, noisy, images.label_N, method='trajectory')
    assert [one['mean_square'] for one in found] == pytest.approx(
        [float(jnp.square(z).mean()) for z in sequences], rel=1e-4
    )
    # The log-determinant is minus the sum of the log-scales, of all positions but the first.
    numbers = (model.num_patches - 1) * model.patch_dim
    assert -sum(one['mean'] for one in found) * numbers == pytest.approx(
        float(logdet.mean()), rel=1e-3, abs=1e-3
    )
    for one in found:
        assert one['smallest'] < one['mean'] < one['largest']
    assert np.isfinite(likelihood.log_prob(model, variables, noisy, images.label_N)).all()
