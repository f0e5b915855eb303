import jax.numpy as jnp
import numpy as np
import pytest

import tarflow_jax as tfj
from tarflow_jax.flow.guidance import guide

CONDITIONAL = (jnp.array([0.5, -0.2]), jnp.array([1.0, 2.0]))
UNCONDITIONAL = (jnp.array([0.1, 0.4]), jnp.array([0.8, 2.5]))


def test_linear_rule_extrapolates():
    a, m = guide('both', 'linear', 2.0, CONDITIONAL, UNCONDITIONAL)
    np.testing.assert_allclose(a, [1.3, -1.4], rtol=1e-6)
    np.testing.assert_allclose(m, [1.4, 1.0], rtol=1e-6)


@pytest.mark.parametrize('rule', ['linear', 'starflow'])
def test_a_target_leaves_the_other_half_alone(rule):
    both = guide('both', rule, 2.0, CONDITIONAL, UNCONDITIONAL)
    a, m = guide('log_scale', rule, 2.0, CONDITIONAL, UNCONDITIONAL)
    assert np.array_equal(a, both[0]) and np.array_equal(m, CONDITIONAL[1])
    a, m = guide('shift', rule, 2.0, CONDITIONAL, UNCONDITIONAL)
    assert np.array_equal(a, CONDITIONAL[0]) and np.array_equal(m, both[1])


def test_starflow_rule_as_its_paper_writes_it():
    w = 1.7
    sigma_c, sigma_u = np.exp(CONDITIONAL[0]), np.exp(UNCONDITIONAL[0])
    s = np.minimum(sigma_c / sigma_u, 1) ** 2
    d = 1 + w - w * s
    a, m = guide('both', 'starflow', w, CONDITIONAL, UNCONDITIONAL)
    np.testing.assert_allclose(np.exp(a), sigma_c / np.sqrt(d), rtol=1e-6)
    wanted = ((1 + w) * np.array(CONDITIONAL[1]) - w * s * np.array(UNCONDITIONAL[1])) / d
    np.testing.assert_allclose(m, wanted, rtol=1e-6)


def test_starflow_rule_cannot_blow_up_the_scale():
    far = (jnp.array([3.0]), jnp.array([0.0])), (jnp.array([-3.0]), jnp.array([0.0]))
    assert guide('both', 'linear', 10.0, *far)[0][0] == pytest.approx(63)
    assert guide('both', 'starflow', 10.0, *far)[0][0] == pytest.approx(3)


@pytest.mark.parametrize('rule', ['linear', 'starflow'])
def test_weight_zero_is_no_guidance(rule):
    for found, wanted in zip(guide('both', rule, 0.0, CONDITIONAL, UNCONDITIONAL), CONDITIONAL):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_annealed_weights_grow_to_the_full_weight():
    annealed = tfj.Guidance(2.0, annealed=True).weights(5)
    np.testing.assert_allclose(annealed, [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(tfj.Guidance(2.0).weights(5), [2.0] * 4)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'weight': -1.0}, 'weight -1.0'),
        ({'weight': float('nan')}, 'weight nan'),
        ({'temperature': 0.0}, 'temperature 0.0'),
        ({'target': 'a'}, "target 'a'.*log_scale"),
        ({'rule': 'cubic'}, "rule 'cubic'.*starflow"),
    ],
)
def test_values_that_mean_nothing(fields, words):
    with pytest.raises(ValueError, match=words):
        tfj.Guidance(**fields)


def test_guidance_between_equal_branches_is_refused():
    with pytest.raises(ValueError, match='labels or a temperature'):
        tfj.Guidance(1.0).check(has_labels=False)
    tfj.Guidance(1.0).check(has_labels=True)
    tfj.Guidance(1.0, temperature=0.3).check(has_labels=False)
    tfj.Guidance(0.0).check(has_labels=False)
