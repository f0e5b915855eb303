"""Drawing and denoising in one call, and what numbered samples are conditioned on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import CONDITIONED, condition_for, noise_for, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.sampling.generate import Conditions, Denoising, denoised, generate

LEVELS = (0.3, 0.2, 0.05)


def test_labels_of_numbered_samples():
    of = Conditions(num_classes=3)
    np.testing.assert_array_equal(of.labels(np.arange(7)), [0, 1, 2, 0, 1, 2, 0])
    np.testing.assert_array_equal(Conditions(3, label=2).labels(np.arange(3)), [2, 2, 2])
    assert of.labels([1]).dtype == Conditions(3, label=2).labels([1]).dtype == np.int32
    assert Conditions().labels(np.arange(3)) is None


def test_conditions_of_numbered_samples():
    features = np.arange(6, dtype=np.float32).reshape(3, 2)
    of = Conditions(num_classes=2, noise_std=0.4, features=features).of
    found = of([5, 0, 4])
    np.testing.assert_array_equal(found.labels, [1, 0, 0])
    np.testing.assert_array_equal(found.features, features[[2, 0, 1]])
    assert found.noise_std == np.float32(0.4)
    np.testing.assert_array_equal(of([5, 0, 4], np.array([1, 1, 1])).labels, [1, 1, 1])
    nothing = Conditions().of([1, 2])
    assert nothing.labels is nothing.noise_std is nothing.features is None


def test_one_step_of_denoising():
    model = tiny((1,))
    variables, noise, labels = perturbed(model), noise_for(model), np.array([0, -1, 2])
    guidance = tfj.Guidance(weight=0.5)
    found = generate(
        model, variables, noise, labels, guidance=guidance, denoising=Denoising(0.1, 0.5),
        return_info=True,
    )
    raw = tfj.sample(model, variables, noise, labels, guidance=guidance)
    np.testing.assert_allclose(found.raw, raw, atol=1e-6)
    clean = tfj.denoise(model, variables, raw, labels, noise_std=0.1, strength=0.5)
    np.testing.assert_allclose(found.samples, clean, atol=1e-6)
    assert np.abs(found.samples - found.raw).max() > 1e-3
    assert found.info.iterations.shape == (1, 3)


@pytest.mark.parametrize('solver', ['ode', 'sde'])
def test_iterative_denoising(solver):
    model = tiny((1,), **CONDITIONED)
    variables, noise = perturbed(model), noise_for(model)
    condition, key = condition_for(model, per_token=False), jax.random.key(4)
    denoising = Denoising(levels=LEVELS, solver=solver, clip=True)
    found = generate(model, variables, noise, condition, denoising=denoising, denoising_key=key)
    raw = tfj.sample(model, variables, noise, condition)
    np.testing.assert_allclose(found.raw, raw, atol=1e-6)
    clean = tfj.iterative_denoise(
        model, variables, raw, condition, levels=LEVELS, solver=solver, clip=True,
        key=key if solver == 'sde' else None,
    )
    np.testing.assert_allclose(found.samples, clean, atol=1e-5)
    assert found.info is None


def test_iterative_denoising_is_in_float32():
    model = tiny((1,), **CONDITIONED)
    variables, samples = perturbed(model), jax.random.normal(jax.random.key(2), (2, 8, 8, 2))
    condition = condition_for(model, 2, per_token=False)
    denoising = Denoising(levels=LEVELS, precision='high')
    found, wanted = (
        denoised(m, variables, samples, condition, denoising)
        for m in (model.clone(dtype=jnp.bfloat16), model)
    )
    np.testing.assert_array_equal(found, wanted)
    program = str(jax.make_jaxpr(
        lambda x: denoised(model, variables, x, condition, denoising)
    )(samples))
    assert program.count('Precision.HIGH,') > program.count('Precision.HIGHEST,')


def test_one_step_of_denoising_is_in_the_dtype_of_the_flow():
    model = tiny((1,), dtype=jnp.bfloat16)
    variables, samples = perturbed(tiny((1,))), jax.random.normal(jax.random.key(2), (3, 8, 8, 2))
    found = denoised(model, variables, samples, None, Denoising(0.1))
    wanted = tfj.denoise(model, variables, samples, noise_std=0.1)
    np.testing.assert_array_equal(found, wanted)


def test_without_denoising_samples_are_raw():
    model = tiny((1,))
    found = generate(model, perturbed(model), noise_for(model))
    assert found.samples is found.raw and found.info is None


def test_sample_images():
    model = tiny((1,))
    variables, guidance = perturbed(model), tfj.Guidance(weight=0.5)
    draw = functools.partial(tfj.sample_images, model, variables, jax.random.key(3), 3)
    found = draw(2, guidance=guidance, denoise=0.1)
    noise = jax.random.normal(jax.random.split(jax.random.key(3))[0], (3, *model.token_shape))
    raw = tfj.sample(model, variables, noise, jnp.full(3, 2), guidance=guidance)
    clean = tfj.denoise(model, variables, raw, jnp.full(3, 2), noise_std=0.1)
    np.testing.assert_allclose(found, clean, atol=1e-6)
    np.testing.assert_allclose(draw(jnp.array([2, 2, 2]), guidance=guidance), raw, atol=1e-6)
    with pytest.raises(ValueError, match='several noise levels'):
        draw(denoise=(0.2, 0.1))
    with pytest.raises(ValueError, match='count 0 must be at least 1'):
        tfj.sample_images(model, variables, jax.random.key(3), 0)


def test_sample_images_of_a_noise_conditioned_flow():
    model = tiny((1,), **CONDITIONED)
    variables, features = perturbed(model), jnp.arange(model.num_features, dtype=jnp.float32)
    draw = functools.partial(
        tfj.sample_images, model, variables, jax.random.key(3), 2, 1, features=features
    )
    noise = jax.random.normal(jax.random.split(jax.random.key(3))[0], (2, *model.token_shape))
    condition = tfj.Condition(jnp.array([1, 1]), LEVELS[0], jnp.stack([features] * 2))
    raw = tfj.sample(model, variables, noise, condition)
    clean = tfj.iterative_denoise(model, variables, raw, condition, levels=LEVELS)
    np.testing.assert_allclose(draw(denoise=LEVELS), clean, atol=1e-6)
    with pytest.raises(ValueError, match='denoise is missing'):
        draw()
