"""The rules of guidance against the formulas of their papers, and what compiled programs take."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import CONDITIONED, condition_for, sequence_flow

import tarflow_jax as tfj
from tarflow_jax.flow.affine import Affine
from tarflow_jax.flow.guidance import RULES, Guidance, GuidanceParams

CONDITIONAL = Affine(jnp.array([0.5, -0.2]), jnp.array([1.0, 2.0]))
UNCONDITIONAL = Affine(jnp.array([0.1, 0.4]), jnp.array([0.8, 2.5]))


def guide(rule, weight, conditional=CONDITIONAL, unconditional=UNCONDITIONAL):
    return RULES[rule](weight, conditional, unconditional)


def combined(target, rule, weight):
    """As compiled programs do: rows side by side, at two positions of one number."""
    rows = Affine(*(
        jnp.stack([c, u])[None] for c, u in zip(CONDITIONAL[:2], UNCONDITIONAL[:2])
    ))
    params = GuidanceParams.of(Guidance(weight, target=target, rule=rule), 2)
    return params.combine(rows, 0).map(lambda x: x[0, 0])


def test_linear_rule_extrapolates():
    a, m, sign = guide('linear', 2.0)
    np.testing.assert_allclose(a, [1.3, -1.4], rtol=1e-6)
    np.testing.assert_allclose(m, [1.4, 1.0], rtol=1e-6)
    assert sign is None


@pytest.mark.parametrize('weight', [0.7, 2.0, 5.0])
def test_linear_sigma_rule_extrapolates_the_scale_itself(weight):
    affine = guide('linear_sigma', weight)
    sigma_c, sigma_u = np.exp(CONDITIONAL.log_scale), np.exp(UNCONDITIONAL.log_scale)
    sigma = np.exp(affine.log_scale) * affine.sign
    np.testing.assert_allclose(sigma, sigma_c + weight * (sigma_c - sigma_u), rtol=1e-5)
    np.testing.assert_allclose(affine.shift, guide('linear', weight).shift)
    assert (sigma[1] < 0) == (weight > 1.5)  # 0.82 - w (1.49 - 0.82)


@pytest.mark.parametrize('rule', RULES)
def test_a_target_leaves_the_other_half_alone(rule):
    both, wanted = combined('both', rule, 2.0), guide(rule, 2.0)
    for found, right in zip(both, wanted):
        np.testing.assert_array_equal(found, right) if right is not None else None
    a, m, sign = combined('log_scale', rule, 2.0)
    assert np.array_equal(a, both.log_scale) and np.array_equal(m, CONDITIONAL.shift)
    assert (sign is None) == (both.sign is None)
    a, m, sign = combined('shift', rule, 2.0)
    assert np.array_equal(a, CONDITIONAL.log_scale) and np.array_equal(m, both.shift)
    assert sign is None


def test_starflow_rule_as_its_paper_writes_it():
    w = 1.7
    sigma_c, sigma_u = np.exp(CONDITIONAL.log_scale), np.exp(UNCONDITIONAL.log_scale)
    s = np.minimum(sigma_c / sigma_u, 1) ** 2
    d = 1 + w - w * s
    a, m, _ = guide('starflow', w)
    np.testing.assert_allclose(np.exp(a), sigma_c / np.sqrt(d), rtol=1e-6)
    wanted = ((1 + w) * np.array(CONDITIONAL.shift) - w * s * np.array(UNCONDITIONAL.shift)) / d
    np.testing.assert_allclose(m, wanted, rtol=1e-6)


def test_starflow_rule_cannot_blow_up_the_scale():
    far = Affine(jnp.array([3.0]), jnp.array([0.0])), Affine(jnp.array([-3.0]), jnp.array([0.0]))
    assert guide('linear', 10.0, *far).log_scale[0] == pytest.approx(63)
    assert guide('starflow', 10.0, *far).log_scale[0] == pytest.approx(3)


@pytest.mark.parametrize('rule', RULES)
def test_weight_zero_is_no_guidance(rule):
    for found, wanted in zip(guide(rule, 0.0)[:2], CONDITIONAL):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_annealed_weights_grow_to_the_full_weight():
    annealed = Guidance(2.0, annealed=True).weights(5)
    np.testing.assert_allclose(annealed, [0, 0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(Guidance(2.0).weights(5), [2.0] * 5)
    np.testing.assert_allclose(Guidance(2.0, annealed=True).weights(1), [0.0])


def test_weights_are_those_of_the_tokens_that_are_predicted():
    params = GuidanceParams.of(Guidance(3.0, annealed=True, rule='linear'), 4)
    rows = Affine(jnp.zeros((1, 2, 2)), jnp.array([[[1.0, 1.0], [0.0, 0.0]]]))
    for first, wanted in ((0, [1, 2]), (2, [3, 4]), (3, [4, 1])):  # past the end: nobody reads
        found = jax.jit(params.combine)(rows, first)
        np.testing.assert_allclose(found.shift[0, 0], wanted, rtol=1e-6)


def test_blocks_are_counted_from_the_noise():
    guidance = Guidance(1.0, blocks=2)
    assert [GuidanceParams.of(guidance, 4, place).branches for place in range(4)] == [2, 2, 1, 1]
    assert [GuidanceParams.of(Guidance(1.0), 4, place).branches for place in (0, 9)] == [2, 2]
    assert GuidanceParams.of(None, 4) == GuidanceParams.of(Guidance(0.0), 4) == GuidanceParams()


def test_weights_and_temperatures_are_data_and_rules_are_not():
    one, other = (
        GuidanceParams.of(Guidance(w, temperature=t), 4) for w, t in ((1.0, 0.5), (2.0, 0.7))
    )
    assert jax.tree.structure(one) == jax.tree.structure(other)
    third = GuidanceParams.of(Guidance(1.0, rule='starflow'), 4)
    assert jax.tree.structure(one) != jax.tree.structure(third)
    assert len(jax.tree.leaves(one)) == 2


def test_branches_of_a_condition():
    flow = sequence_flow(**CONDITIONED)
    condition = condition_for(flow)
    found, temperature = GuidanceParams.of(Guidance(1.0, temperature=0.3), 4).branch(condition, 3)
    np.testing.assert_array_equal(found.labels[1::2], -1)
    np.testing.assert_array_equal(found.labels[::2], condition.labels)
    np.testing.assert_allclose(np.ravel(temperature), [1, 0.3] * 3)
    assert temperature.shape == (6, 1, 1, 1)
    assert GuidanceParams().branch(condition, 3) == (condition, 1.0)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'weight': -1.0}, 'weight -1.0'),
        ({'weight': float('nan')}, 'weight nan'),
        ({'temperature': 0.0}, 'temperature 0.0'),
        ({'temperature': float('inf')}, 'temperature inf'),
        ({'target': 'a'}, "target 'a'.*log_scale"),
        ({'rule': 'cubic'}, "rule 'cubic'.*linear_sigma.*starflow"),
        ({'blocks': 0}, 'blocks 0 must be at least 1; None guides all'),
    ],
)
def test_values_that_mean_nothing(fields, words):
    with pytest.raises(ValueError, match=words):
        tfj.Guidance(**fields)


def test_guidance_between_equal_branches_is_refused():
    plain, classes = sequence_flow(), sequence_flow(num_classes=3)
    features = sequence_flow(num_features=2)
    labels, vectors = np.zeros(3, int), tfj.Condition(features=np.zeros((3, 2)))
    for flow, condition in ((plain, None), (plain, labels), (classes, None), (features, labels)):
        with pytest.raises(ValueError, match='labels, features or a temperature other than 1'):
            Guidance(1.0).check(flow, condition)
        Guidance(1.0, temperature=0.3).check(flow, condition)
        Guidance(0.0).check(flow, condition)
    Guidance(1.0).check(classes, labels)
    Guidance(1.0).check(features, vectors)


def test_it_is_hashable_and_plain():
    guidance = Guidance(1.5, rule='linear_sigma', blocks=1)
    assert hash(guidance) == hash(dataclasses.replace(guidance))
    assert Guidance(**dataclasses.asdict(guidance)) == guidance
