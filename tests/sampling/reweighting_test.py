"""Importance weights and annealing, against densities whose normalizer and moments are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import condition_for, noise_for, perturbed, sequence_flow

import tarflow_jax as tfj
from tarflow_jax.sampling.reweighting import _systematic

# Features, which have to stay with their samples.
FLOW = sequence_flow(layers_per_block=(1,), first_token='start', num_features=2)
VARIABLES, CONDITION = perturbed(FLOW, amount=0.1), condition_for(FLOW, 600)
FEW = tfj.Condition(features=CONDITION.features[:64])
MEAN, DEVIATION = 0.3, 0.8


def gaussian(x):
    """Unnormalized; its integral is (2 pi 0.64)^(T D / 2)."""
    return -0.5 * jnp.square((x - MEAN) / DEVIATION).sum((1, 2))


LOG_NORMALIZER = 0.5 * FLOW.num_dims * math.log(2 * math.pi * DEVIATION**2)


@pytest.fixture(scope='module')
def drawn():
    return tfj.sample(FLOW, VARIABLES, noise_for(FLOW, 600), CONDITION, return_log_prob=True)


@pytest.fixture(scope='module')
def moved(drawn):
    return tfj.anneal(
        FLOW, VARIABLES, gaussian, drawn[0], CONDITION, key=jax.random.key(1), steps=20,
        step_size=0.1, resample_below=0.7,
    )


def test_effective_sample_size():
    def share(*weights):
        return float(tfj.effective_sample_size(jnp.log(jnp.array(weights))))

    assert share(2, 2, 2, 2) == pytest.approx(4)
    assert share(0, 1, 0) == pytest.approx(1)
    assert share(1, 2, 3) == pytest.approx(36 / 14)
    # Weights are known up to a factor, however large.
    far = jnp.log(jnp.array([1.0, 2, 3])) - 1e4
    assert float(tfj.effective_sample_size(far)) == pytest.approx(36 / 14, rel=1e-2)
    assert np.isnan(tfj.effective_sample_size(jnp.array([0.0, jnp.nan])))


def test_one_step_is_importance_sampling(drawn):
    """In batches that do not divide the samples."""
    x, log_prob = drawn
    found = tfj.anneal(
        FLOW, VARIABLES, gaussian, x, CONDITION, key=jax.random.key(0), steps=1, resample_below=0,
        batch_size=250,
    )
    weights = gaussian(x) - log_prob
    np.testing.assert_allclose(found.log_weights, weights, atol=1e-4)
    np.testing.assert_allclose(
        found.log_normalizer, jax.nn.logsumexp(weights) - math.log(len(x)), atol=1e-4
    )
    np.testing.assert_allclose(
        found.effective, tfj.effective_sample_size(weights)[None] / len(x), rtol=1e-4
    )
    np.testing.assert_array_equal(found.ancestors, np.arange(len(x)))


def test_it_finds_the_normalizer_and_the_moments(drawn, moved):
    x, log_prob = drawn
    before = tfj.effective_sample_size(gaussian(x) - log_prob)
    assert before < 0.5 * len(x)  # or there is nothing to gain
    assert float(moved.effective.min()) * len(x) > before
    assert abs(moved.log_normalizer - LOG_NORMALIZER) < 0.15
    weights = jax.nn.softmax(moved.log_weights)
    effective = tfj.effective_sample_size(moved.log_weights)
    deviations = 4 * DEVIATION / math.sqrt(effective)
    mean = jnp.einsum('b,btd->td', weights, moved.samples)
    assert abs(mean - MEAN).max() < 1.5 * deviations  # resampled ones are correlated
    variance = jnp.einsum('b,btd->td', weights, jnp.square(moved.samples - MEAN))
    assert abs(variance.mean() - DEVIATION**2) < 0.06


def test_resampling_is_seen_in_the_ancestors(moved):
    assert float(moved.effective.min()) < 0.7
    assert len(np.unique(moved.ancestors)) < 600
    assert (np.asarray(moved.ancestors) < 600).all()
    # The step size has adapted.
    assert abs(float(moved.acceptance[-5:].mean()) - 0.574) < 0.1


WALL = 0.5


def wall(x):
    """Energies up to 1e20: no sample there is effective in an equal step."""
    return gaussian(x) - 1e20 * jnp.square(jnp.maximum(x[:, 0, 0] - WALL, 0)) ** 2


def kept(drawn, keep):
    return tfj.anneal(
        FLOW, VARIABLES, wall, drawn[0], CONDITION, key=jax.random.key(2), steps=25, step_size=0.1,
        resample_below=0.3, keep=keep,
    )


def test_steps_that_keep_a_share_of_the_samples(drawn):
    """As long as the share allows; the rest of them move the samples at the target."""
    found = kept(drawn, 0.85)
    times, effective = np.asarray(found.times), np.asarray(found.effective)
    assert 0 < times[0] < 1e-6 and (np.diff(times) >= 0).all() and times[-1] == 1
    # Weights are equal before the first step.
    assert effective[0] == pytest.approx(0.85, abs=1e-3)
    reached = int(np.argmax(times == 1))
    assert 4 <= reached < 20
    np.testing.assert_array_equal(effective[reached + 1:], effective[-1])
    assert float(found.acceptance[reached:].mean()) == pytest.approx(0.574, abs=0.1)
    share = 0.5 * (1 + math.erf((WALL - MEAN) / DEVIATION / 2**0.5))
    assert abs(found.log_normalizer - LOG_NORMALIZER - math.log(share)) < 0.3


def test_the_last_step_reaches_the_target_in_any_case(drawn):
    found = kept(drawn, 0.999)
    assert 0 < float(found.times[-2]) < 0.9 and found.times[-1] == 1


def test_the_flow_as_its_own_target(drawn):
    x, _ = drawn

    def own(x):
        return tfj.log_prob(FLOW, VARIABLES, x, FEW)

    found = tfj.anneal(FLOW, VARIABLES, own, x[:64], FEW, key=jax.random.key(0), steps=3)
    np.testing.assert_allclose(found.log_weights, 0, atol=1e-4)
    np.testing.assert_allclose(found.log_normalizer, 0, atol=1e-4)
    assert abs(found.samples - x[:64]).max() > 0.1 and float(found.acceptance.min()) > 0.5


def test_samples_outside_of_the_target_die(drawn):
    """Weights of 0, and moves out of the support are rejected."""
    x, _ = drawn

    def half(x):
        return jnp.where(x[:, 0, 0] > 0, gaussian(x), -jnp.inf)

    found = tfj.anneal(
        FLOW, VARIABLES, half, x[:64], FEW, key=jax.random.key(0), steps=3, resample_below=1
    )
    alive = np.isfinite(found.log_weights)
    assert alive.all()
    assert (np.asarray(found.samples)[alive, 0, 0] > 0).all()


def test_systematic_resampling():
    log_weights = jnp.log(jnp.array([0.1, 0.0, 0.55, 0.35])) + 7
    for key in jax.random.split(jax.random.key(0), 5):
        counts = np.bincount(_systematic(key, log_weights), minlength=4)
        assert counts[1] == 0 and (abs(counts - 4 * np.array([0.1, 0, 0.55, 0.35])) < 1).all()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'steps': 0}, 'steps 0'),
        ({'step_size': 0.0}, 'step_size 0.0'),
        ({'resample_below': 2}, 'resample_below 2'),
        ({'keep': 1.0}, 'keep 1.0 must be a share'),
        ({'log_target': lambda x: gaussian(x).sum()}, 'one number for each sample'),
        ({'log_target': lambda x: gaussian(x) * jnp.nan}, 'not finite at any'),
        ({'samples': jnp.zeros((2, 5, 2))}, r'\[B, 4, 2\]'),
    ],
)
def test_errors(drawn, arguments, message):
    given = {'log_target': gaussian, 'samples': drawn[0][:8], 'steps': 1} | arguments
    with pytest.raises(ValueError, match=message):
        tfj.anneal(FLOW, VARIABLES, key=jax.random.key(0), **given)
