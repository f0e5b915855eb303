"""The schedule against the recorded one, AdamW against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import FOLDER

from tarflow_jax.training.optimizer import adamw, learning_rate_schedule

RECORDED = dict(np.load(FOLDER / 'trajectory' / 'case.npz'))


def recorded_schedule():
    return learning_rate_schedule(
        peak=float(RECORDED['peak_lr']),
        floor=float(RECORDED['min_lr']),
        warmup_steps=int(RECORDED['warmup_steps']),
        total_steps=int(RECORDED['total_steps']),
    )


def constant(value):
    return lambda k: jnp.full((), value)


def test_schedule_is_the_recorded_one():
    found = [float(recorded_schedule()(k)) for k in range(24)]
    np.testing.assert_allclose(found, RECORDED['learning_rate'], rtol=1e-6)


def test_schedule_by_hand():
    schedule = learning_rate_schedule(peak=1.0, floor=0.1, warmup_steps=4, total_steps=8)
    found = [float(schedule(k)) for k in range(10)]
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 4)) / 2 for i in range(4)]
    wanted = [0.1, 0.325, 0.55, 0.775, *cosine, 0.1, 0.1]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_schedule_without_warm_up_starts_at_the_peak():
    schedule = learning_rate_schedule(peak=1.0, floor=0.1, warmup_steps=0, total_steps=2)
    np.testing.assert_allclose([schedule(0), schedule(1), schedule(2)], [1.0, 0.55, 0.1], rtol=1e-6)


@pytest.mark.parametrize('warmup, total', [(4, 4), (5, 4), (0, 0), (-1, 4)])
def test_schedule_refuses(warmup, total):
    with pytest.raises(ValueError, match='warmup_steps .* leave none of total_steps'):
        learning_rate_schedule(peak=1.0, floor=0.1, warmup_steps=warmup, total_steps=total)


def run(optimizer, params, gradients):
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def test_adamw_by_hand():
    b1, b2, eps, decay = 0.9, 0.95, 1e-8, 0.1
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(5, 7)).astype(np.float32)
    start = rng.normal(size=7).astype(np.float32)
    schedule = recorded_schedule()
    optimizer = adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=decay)
    found = run(optimizer, jnp.array(start), jnp.array(gradients))

    p, m, v = start.astype(np.float64), np.zeros(7), np.zeros(7)
    for k, g in enumerate(gradients.astype(np.float64)):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        step = (m / (1 - b1 ** (k + 1))) / (np.sqrt(v / (1 - b2 ** (k + 1))) + eps)
        # Decoupled: the decay is not divided by the root of the second moment.
        p = p - float(schedule(k)) * (step + decay * p)
    # The values are near 1, where float32 resolves 6e-8; the changes are 2e-4 to 1e-3.
    np.testing.assert_allclose(found - start, p - start, atol=2e-7)
    assert np.abs(p - start).min() > 1e-4


def test_every_parameter_decays():
    params = {'bias': jnp.full(3, 2.0), 'kernel': jnp.full((2, 2), 2.0), 'scale': jnp.array(2.0)}
    gradients = [jax.tree.map(jnp.zeros_like, params)]
    after = run(adamw(constant(0.5), weight_decay=0.1), params, gradients)
    for leaf in jax.tree.leaves(after):
        np.testing.assert_allclose(leaf, 2.0 - 0.5 * 0.1 * 2.0, rtol=1e-6)


@pytest.mark.parametrize('norm, factor', [(10.0, 0.2), (1.0, 1.0)])
def test_clipping_to_a_global_norm(norm, factor):
    # Two leaves, of norm 0.6 and 0.8 times `norm`: together above the limit of 2, or below.
    gradient = {'a': jnp.array([0.6 * norm, 0.0]), 'b': jnp.array([[-0.8 * norm]])}
    params = jax.tree.map(jnp.zeros_like, gradient)
    optimizer = adamw(constant(1.0), clip_norm=2.0)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    first_moments = state[1][0].mu
    wanted = jax.tree.map(lambda g: 0.1 * factor * g, gradient)
    for found, leaf in zip(jax.tree.leaves(first_moments), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(found, leaf, rtol=1e-5)


def test_clip_norm_does_not_change_the_tree_of_the_state():
    params = {'a': jnp.zeros(3)}
    trees = [jax.tree.structure(adamw(constant(1.0), clip_norm=c).init(params)) for c in (0.0, 1.0)]
    assert trees[0] == trees[1]


def test_negative_clip_norm_is_refused():
    with pytest.raises(ValueError, match='^clip_norm -1.0 must not be negative'):
        adamw(constant(1.0), clip_norm=-1.0)
