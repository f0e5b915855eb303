"""Interpolation: its ends, its middle, and what does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import apply, noise_for, normal, perturbed, sequence_flow, tiny

import tarflow_jax as tfj


def test_the_ends_are_the_examples_and_the_middle_lies_on_the_sphere():
    model = sequence_flow(num_classes=3, volume_preserving=True)
    variables = perturbed(model) | {'prior': {'variance': 0.5 + jnp.square(normal(1, 4, 2))}}
    start, end, labels = normal(0, 2, 4, 2), normal(1, 2, 4, 2), jnp.array([2, -1])
    found = tfj.interpolate(model, variables, start, end, labels, steps=3)
    assert found.shape == (3, 2, 4, 2)
    np.testing.assert_allclose(found[0], start, atol=1e-5)
    np.testing.assert_allclose(found[2], end, atol=1e-5)
    deviation = jnp.sqrt(variables['prior']['variance'])
    a, b, middle = (apply(model, variables, x, labels)[0] / deviation for x in (start, end, found[1]))
    cosine = (a * b).sum((1, 2)) / jnp.sqrt(jnp.square(a).sum((1, 2)) * jnp.square(b).sum((1, 2)))
    wanted = (a + b) / jnp.sqrt(2 * (1 + cosine))[:, None, None]
    np.testing.assert_allclose(middle, wanted, atol=1e-4)


def test_latents_and_an_example_with_itself():
    model = sequence_flow(volume_preserving=True)
    variables, z = perturbed(model), noise_for(model, 2)
    found = tfj.interpolate(model, variables, z, z, steps=2, latents=True)
    wanted = tfj.sample(model, variables, z)
    np.testing.assert_allclose(found, jnp.stack([wanted, wanted]), atol=1e-6)


def test_noise_is_added_and_removed():
    model = tiny((1,))
    variables, (start, end) = perturbed(model), normal(0, 2, 2, 8, 8, 2)
    found = tfj.interpolate(model, variables, start, end, steps=2, denoise=0.1)
    noise = jax.random.normal(jax.random.split(jax.random.key(0))[0], start.shape)
    wanted = tfj.denoise(model, variables, start + 0.1 * noise, noise_std=0.1)
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


@pytest.mark.parametrize('given, words', [
    ({'steps': 1}, 'steps 1 must be at least 2'),
    ({'end': np.zeros((3, 4, 2), np.float32)}, r'start has shape \(2, 4, 2\) and end \(3, 4, 2\)'),
    ({'denoise': (0.2, 0.1)}, 'several noise levels'),
    ({'condition': np.array([0])}, r'labels have shape \(1,\)'),
])
def test_arguments_that_do_not_fit(given, words):
    model, x = sequence_flow(), np.zeros((2, 4, 2), np.float32)
    with pytest.raises(ValueError, match=words):
        tfj.interpolate(model, perturbed(model), **{'start': x, 'end': x, **given})
