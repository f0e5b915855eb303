"""What a flow is conditioned on: its parts, its place in transformations, and its checks."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import (
    CONDITIONED,
    apply,
    condition_for,
    noise_for,
    perturbed,
    sequence_flow,
    tiny,
)

import tarflow_jax as tfj
from tarflow_jax.flow.condition import (
    as_condition,
    at_noise_level,
    batch_size_of,
    both_branches,
    check_condition,
    drop,
    informative,
    per_example,
    rows,
)

FLOW = sequence_flow(first_token='start', **CONDITIONED)
FULL = condition_for(FLOW)


def equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_labels_alone_are_a_condition():
    assert as_condition(None) == tfj.Condition()
    labels = jnp.array([1, -1])
    assert as_condition(labels).labels is labels
    assert as_condition(FULL) is FULL


def test_it_is_a_pytree_in_jit_and_vmap():
    variables, x = perturbed(FLOW, amount=0.15), noise_for(FLOW)
    z, _ = apply(FLOW, variables, x, FULL)

    @jax.jit
    @jax.vmap
    def one(x, condition):
        assert isinstance(condition, tfj.Condition)
        with_batch = jax.tree.map(lambda a: a[None], (x, condition))
        return FLOW.apply(variables, *with_batch)[0][0]

    np.testing.assert_allclose(one(x, FULL), z, atol=1e-5)
    assert len(jax.tree.leaves(FULL)) == 3 and not jax.tree.leaves(tfj.Condition())
    params = variables['params']['block_0']
    slope = jax.grad(lambda t: FLOW.block(0).context(params, at_noise_level(FULL, t)).sum())(
        jnp.float32(0.3)
    )
    assert np.isfinite(slope) and slope != 0


def test_a_number_is_the_level_of_all():
    variables, x = perturbed(FLOW, amount=0.15), noise_for(FLOW)
    one, _ = apply(FLOW, variables, x, at_noise_level(FULL, 0.3))
    each, _ = apply(FLOW, variables, x, at_noise_level(FULL, jnp.full(3, 0.3)))
    np.testing.assert_allclose(one, each, rtol=1e-5, atol=1e-5)
    other, _ = apply(FLOW, variables, x, at_noise_level(FULL, 0.4))
    assert abs(one - other).max((1, 2)).min() > 1e-3


def test_what_is_missing_is_as_if_it_was_not_given():
    variables, x = perturbed(FLOW, amount=0.15), noise_for(FLOW)
    given, _ = apply(FLOW, variables, x, FULL)
    none, _ = apply(FLOW, variables, x, tfj.Condition(noise_std=FULL.noise_std))
    np.testing.assert_allclose(given[0], none[0], atol=1e-6)  # label -1, features NaN
    assert abs(given - none).max((1, 2))[1:].min() > 1e-2
    # One token's features can be missing by themselves.
    features = FULL.features.at[1, 2].set(jnp.nan)
    some, _ = apply(FLOW, variables, x, tfj.Condition(FULL.labels, FULL.noise_std, features))
    assert np.isfinite(some).all()
    # Block 0 is in raster order and block 1 reversed: all tokens of example 1 may change.
    assert abs(some - given)[1].max() > 1e-3
    np.testing.assert_allclose(some[2], given[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('call', ['log_prob', 'sample', 'sample_trajectory', 'calibrate', 'denoise'])
def test_labels_may_be_named_as_such(call, monkeypatch):
    found, home = {}, importlib.import_module(f'tarflow_jax.{tfj._HOMES[call]}')

    def check(model, condition, batch):
        found['labels'] = as_condition(condition).labels
        raise KeyboardInterrupt

    monkeypatch.setattr(home, 'check_condition', check)
    model = tiny((1,))
    examples = () if call == 'calibrate' else (
        noise_for(model) if call.startswith('sample') else jnp.zeros((3, 8, 8, 2)),
    )
    more = {'noise_std': 0.1} if call == 'denoise' else {}
    with pytest.raises(KeyboardInterrupt):
        getattr(tfj, call)(model, perturbed(model), *examples, labels=np.array([0, 1, 2]), **more)
    np.testing.assert_array_equal(found['labels'], [0, 1, 2])


def test_drop_leaves_the_noise_level():
    found = drop(FULL, jnp.array([False, True, False]))
    np.testing.assert_array_equal(found.labels, [-1, -1, 1])
    np.testing.assert_array_equal(found.noise_std, FULL.noise_std)
    assert np.isnan(found.features[1]).all()
    np.testing.assert_array_equal(found.features[2], FULL.features[2])
    equal(drop(None, jnp.array([True])), tfj.Condition())
    vectors = condition_for(FLOW, per_token=False)
    assert np.isnan(drop(vectors, jnp.array([True] * 3)).features).all()


def test_both_branches_stand_side_by_side():
    found = both_branches(at_noise_level(FULL, 0.2), 3)
    np.testing.assert_array_equal(found.labels, [-1, -1, 0, -1, 1, -1])
    assert float(found.noise_std) == pytest.approx(0.2)
    np.testing.assert_array_equal(found.features[::2], FULL.features)
    assert np.isnan(found.features[1::2]).all()
    np.testing.assert_array_equal(
        both_branches(FULL, 3).noise_std, np.repeat(FULL.noise_std, 2)
    )
    assert both_branches(None, 3) == tfj.Condition()


def test_rows_and_levels_of_each():
    found = rows(at_noise_level(FULL, 0.2), np.array([2, 0]))
    np.testing.assert_array_equal(found.labels, [1, -1])
    np.testing.assert_array_equal(found.features[0], FULL.features[2])
    assert found.noise_std == 0.2
    np.testing.assert_allclose(per_example(found, 2).noise_std, [0.2, 0.2])
    assert per_example(jnp.array([1, 2]), 2).noise_std is None
    np.testing.assert_array_equal(per_example(FULL, 3).noise_std, FULL.noise_std)


@pytest.mark.parametrize('condition, size', [
    (None, None), (np.arange(5), 5), (tfj.Condition(noise_std=0.1), None),
    (tfj.Condition(noise_std=np.ones(2)), 2), (tfj.Condition(features=np.ones((4, 2))), 4),
])
def test_batch_size(condition, size):
    assert batch_size_of(condition) == size


def test_informative():
    plain, classes, features = sequence_flow(), sequence_flow(num_classes=3), sequence_flow(num_features=2)
    labels, vectors = np.zeros(2, int), tfj.Condition(features=np.zeros((2, 2)))
    assert not informative(plain, labels) and not informative(classes, None)
    assert informative(classes, labels) and informative(features, vectors)
    assert not informative(features, tfj.Condition(noise_std=0.1))


NAN_IN_PART = np.where(np.arange(24).reshape(3, 4, 2) == 5, np.nan, 1).astype(np.float32)
WRONG = [
    ({'labels': np.arange(2)}, r'labels have shape \(2,\); a batch of 3 needs \(3,\)'),
    ({'labels': np.zeros((3, 1), int)}, r'labels have shape \(3, 1\)'),
    ({'labels': np.zeros(3, np.float32)}, r'labels are float32; pass int32.*features=\.\.\.'),
    ({'labels': np.array([0, 3, 1])}, r'label 3 is outside 0\.\.2'),
    ({'labels': np.array([0, -2, 1])}, r'label -2 is outside 0\.\.2.*-1 means no class'),
    ({'noise_std': None}, r'noise_std is missing.*Condition\(noise_std=\.\.\.\)'),
    ({'noise_std': np.ones(2)}, r'noise_std has shape \(2,\); pass a number or shape \(3,\)'),
    ({'noise_std': np.ones((3, 1))}, r'noise_std has shape \(3, 1\)'),
    ({'noise_std': 0.0}, 'noise_std 0.0 must be finite and above 0'),
    ({'noise_std': np.array([0.1, -1.0, 1.0])}, 'noise_std .*-1.* must be finite and above 0'),
    ({'noise_std': float('nan')}, 'noise_std nan must be finite'),
    ({'features': np.ones((3, 3), np.float32)}, r'features have shape \(3, 3\); this flow takes \[3, 2\] or \[3, 4, 2\]'),
    ({'features': np.ones((2, 2), np.float32)}, r'features have shape \(2, 2\)'),
    ({'features': np.ones((3, 5, 2), np.float32)}, r'features have shape \(3, 5, 2\)'),
    ({'features': np.ones((3, 2), int)}, 'features are int64; pass float32|features are int32; pass float32'),
    ({'features': np.full((3, 2), np.inf, np.float32)}, 'features are not finite'),
    ({'features': NAN_IN_PART}, 'all finite, or all NaN'),
]


@pytest.mark.parametrize('fields, words', WRONG, ids=[words[:30] for _, words in WRONG])
def test_what_does_not_fit_is_said_in_one_sentence(fields, words):
    condition = tfj.Condition(**{'noise_std': 0.1, **fields})
    with pytest.raises(ValueError, match=words) as error:
        check_condition(FLOW, condition, 3)
    assert '\n' not in str(error.value) and str(error.value).endswith('.')


def test_what_a_flow_does_not_take():
    plain = sequence_flow()
    with pytest.raises(ValueError, match='noise_std is given.*noise_conditioned=True'):
        check_condition(plain, tfj.Condition(noise_std=0.1), 3)
    with pytest.raises(ValueError, match='features are given.*num_features'):
        check_condition(plain, tfj.Condition(features=np.ones((3, 2))), 3)
    # Labels are ignored by flows without classes, whatever they are.
    check_condition(plain, np.array([7, 8, 9]), 3)


def test_values_are_not_looked_at_inside_jit():
    @jax.jit
    def check(condition):
        return check_condition(FLOW, condition, 3)

    found = check(tfj.Condition(np.array([0, 9, 1]), -1.0, NAN_IN_PART))
    np.testing.assert_array_equal(found.labels, [0, 9, 1])
    with pytest.raises(ValueError, match='labels have shape'):
        check(tfj.Condition(np.array([0, 1]), 1.0))


def test_a_wrong_condition_is_refused_by_every_function():
    variables, wrong = perturbed(FLOW), tfj.Condition(noise_std=-1.0)
    x = np.zeros((3, 4, 2), np.float32)
    for call in (
        lambda: FLOW.apply(variables, x, wrong),
        lambda: tfj.log_prob(FLOW, variables, x, wrong),
        lambda: tfj.sample(FLOW, variables, x, wrong),
        lambda: tfj.sample_trajectory(FLOW, variables, x, wrong),
        lambda: tfj.denoise(FLOW, variables, x, wrong, noise_std=0.1),
        lambda: tfj.calibrate(FLOW, variables, wrong),
    ):
        with pytest.raises(ValueError, match='noise_std -1.0 must be finite and above 0'):
            call()
