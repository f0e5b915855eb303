"""Fitting to arrays: the loss falls, the best parameters are kept, the key decides everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import normal, sequence_flow

import tarflow_jax as tfj
from tarflow_jax.training import fit as fitting

FLOW = sequence_flow(num_features=2, layers_per_block=(1,))
X = 0.3 * normal(0, 64, 4, 2) + 1.0
GIVEN = tfj.Condition(features=normal(1, 64, 2))


def run(steps=30, key=0, **options):
    options = {'batch_size': 16, 'learning_rate': 1e-2, 'ema_decay': 0.0, **options}
    return tfj.fit(FLOW, X, GIVEN, key=jax.random.key(key), steps=steps, **options)


@pytest.fixture(scope='module')
def fitted():
    return run(held_out=(X[:24], fitting.conditions.rows(GIVEN, np.arange(24))), validate_every=10)


def test_losses_are_nats_of_an_example(fitted):
    assert fitted.losses.shape == (30,)
    # Of an untrained flow, which is the identity: the Gaussian density at the batch.
    start = 0.5 * np.square(X).sum((1, 2)).mean() + 4 * np.log(2 * np.pi)
    assert abs(fitted.losses[0] - start) < 0.5
    assert fitted.losses[-1] < fitted.losses[0] - 1
    steps, held_out = zip(*fitted.held_out_losses)
    assert steps == (10, 20, 30)
    nats = tfj.log_prob(FLOW, fitted.variables, X[:24], tfj.Condition(features=GIVEN.features[:24]))
    np.testing.assert_allclose(-nats.mean(), min(held_out), rtol=1e-5)


def test_the_key_decides_everything(fitted):
    again = run()
    np.testing.assert_array_equal(again.losses, fitted.losses)  # validation changes nothing
    assert abs(run(key=1, steps=2).losses - again.losses[:2]).max() > 1e-3


def test_stops_when_nothing_improves():
    away = (4 * normal(2, 24, 4, 2), fitting.conditions.rows(GIVEN, np.arange(24)))
    found = run(held_out=away, validate_every=5, patience=3)
    steps, held_out = zip(*found.held_out_losses)
    assert steps == (5, 10, 15, 20) and min(held_out) == held_out[0]
    np.testing.assert_allclose(
        -tfj.log_prob(FLOW, found.variables, *away).mean(), held_out[0], rtol=1e-5
    )


def test_augments_and_drops():
    seen = []

    def far(key, x, condition):
        return x + 100 * jnp.isnan(condition.features).any(1)[:, None, None], condition

    def report(step, loss):
        seen.append((step, loss))

    kept = run(steps=2, augment=far, progress=report, validate_every=1)
    dropped = run(steps=2, augment=lambda key, x, c: (x + 2, c), dropout=0.5)
    assert kept.losses[0] == run(steps=2).losses[0]
    assert dropped.losses[0] > kept.losses[0] + 5
    assert seen == [(1, pytest.approx(kept.losses[0])), (2, pytest.approx(kept.losses[1]))]


def test_stops_at_gradients_that_are_not_finite():
    with pytest.raises(FloatingPointError, match='of the last 5 steps, up to step 5, are not finite'):
        tfj.fit(FLOW, X * jnp.nan, key=jax.random.key(0), steps=30, batch_size=8, validate_every=5)


@pytest.mark.parametrize('options, message', [
    ({'batch_size': 65}, 'batch_size 65 is more than the 64 examples'),
    ({'steps': 0}, 'steps 0 must be at least 1'),
    ({'patience': 2}, 'patience 2 needs held_out'),
    ({'held_out': X[:, :3]}, r'the examples have shape \(64, 3, 2\)'),
])
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
