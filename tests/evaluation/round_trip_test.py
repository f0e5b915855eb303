"""The certificate, against flows that invert exactly, badly and not at all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import CONDITIONED, apply, batch, condition_for, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.evaluation.round_trip import IMAGE_LIMIT, _error, _not_finite, round_trip

MODEL = tiny((1, 1))


@functools.cache
def certified(guided=False, **fields):
    model = tiny((1, 1), **fields)
    images, labels = batch(model, count=8)
    return round_trip(
        model, perturbed(model), images, labels, key=jax.random.key(3),
        guidance=tfj.Guidance(weight=1.0) if guided else None,
    )


@pytest.mark.parametrize('volume_preserving', [False, True])
def test_float32_inverts_and_bfloat16_less_so(volume_preserving):
    found = certified(volume_preserving=volume_preserving)
    exact, rough = found['float32'], found['bfloat16']
    for way in ('image_z_image', 'z_image_z'):
        assert exact[way]['max'] < 2e-5
        assert 1e-4 < rough[way]['max'] < 1
        assert exact[way]['rms'] <= exact[way]['max']
        for block in exact['blocks']:
            assert block[way]['max'] <= 2e-5
        assert len(rough['blocks']) == 2
        assert max(block[way]['max'] for block in rough['blocks']) > 1e-4
    assert exact['bits_per_dim_error'] == 0 and exact['not_finite'] == 0
    assert exact['logdet_sum'] < 1e-6
    if volume_preserving:
        assert rough['logdet_sum'] == 0
    else:
        assert 0 < rough['logdet_sum'] < 0.1
    assert 0 < rough['bits_per_dim_error'] < 0.1
    assert found['trusted']['float32'] == {'sampling': True, 'likelihood': True}
    assert found['images'] == 8


def test_whole_errors_are_those_of_the_public_functions():
    found = certified()['bfloat16']
    model, variables = tiny((1, 1), dtype=jnp.bfloat16), perturbed(MODEL)
    images, labels = batch(MODEL, count=8)
    z, _ = apply(model, variables, images, labels)
    back = tfj.sample(model, variables, z, labels)
    np.testing.assert_allclose(
        found['image_z_image']['max'], abs(back - images).max(), rtol=0.3
    )
    noise = jax.random.normal(jax.random.key(3), z.shape)
    again, _ = apply(model, variables, tfj.sample(model, variables, noise, labels), labels)
    np.testing.assert_allclose(found['z_image_z']['rms'], np.sqrt(np.square(again - noise).mean()),
                               rtol=0.3)


def test_flow_with_every_condition():
    model = tiny((1, 1), **CONDITIONED)
    images, _ = batch(model, count=8)
    condition = condition_for(model, 8, per_token=False)
    variables = perturbed(model)
    found = round_trip(
        model, variables, images, condition, key=jax.random.key(3),
        guidance=tfj.Guidance(weight=1.0), dtypes=('float32',),
    )
    exact = found['float32']
    assert exact['image_z_image']['max'] < 2e-5 and exact['z_image_z']['max'] < 2e-5
    assert exact['guided_not_finite'] == 0 and exact['logdet_sum'] < 1e-6
    noise = jax.random.normal(jax.random.key(3), (8, *model.token_shape))
    again, _ = apply(model, variables, tfj.sample(model, variables, noise, condition), condition)
    assert 0 < exact['z_image_z']['rms'] == pytest.approx(
        float(np.sqrt(np.square(again - noise).mean())), rel=0.5
    )


def test_guided_samples_are_counted():
    found = certified(guided=True)
    assert found['float32']['guided_not_finite'] == 0
    assert 'guided_not_finite' not in certified()['float32']


def test_flow_that_overflows():
    variables = jax.tree.map(jnp.array, perturbed(MODEL))
    out = variables['params']['block_1']['proj_out']
    half = out['bias'].shape[0] // 2
    out['bias'] = out['bias'].at[:half].set(90.0)  # exp(90) in the inverse; exp(-90) in the forward
    images, labels = batch(MODEL, count=8)
    found = round_trip(MODEL, variables, images, labels, key=jax.random.key(3))
    assert found['float32']['not_finite'] == 1
    assert found['float32']['z_image_z']['not_finite'] == 1
    assert not found['trusted']['float32']['sampling']


def test_errors_are_those_of_the_finite_images():
    # Not as max() over them all: on a CPU that of XLA passes over NaN, and the mean does not.
    wanted = jnp.zeros((4, 3, 2))
    found = wanted.at[1, 0, 0].set(jnp.nan).at[2, 1, 1].set(-3.0).at[3, 2, 0].set(jnp.inf)
    error = jax.tree.map(float, _error(found, wanted))
    assert error == {'max': 3.0, 'rms': pytest.approx(np.sqrt(9 / 12)), 'not_finite': 0.5}


@pytest.mark.parametrize('count', [1, 3, 10, 20, 100])
def test_share_of_images_that_are_not_finite_is_counted(count):
    images = jnp.zeros((count, 2, 2, 1))
    assert _not_finite(images) == float(_error(images, images)['not_finite']) == 0
    broken = images.at[0, 0, 0, 0].set(jnp.nan)
    assert _not_finite(broken) == float(_error(broken, images)['not_finite'])
    assert _not_finite(broken) == pytest.approx(1 / count)


def test_error_is_measured_in_the_units_of_images():
    # Large log-scales that the next block undoes: the digits lost there show at the image.
    variables = jax.tree.map(jnp.array, perturbed(MODEL))
    for block, scale in (('block_0', 4.0), ('block_1', -4.0)):
        out = variables['params'][block]['proj_out']
        half = out['bias'].shape[0] // 2
        out['bias'] = out['bias'].at[:half].set(scale)
    images, labels = batch(MODEL, count=8)
    found = round_trip(MODEL, variables, images, labels, key=jax.random.key(3))
    assert found['bfloat16']['image_z_image']['rms'] > IMAGE_LIMIT
    assert not found['trusted']['bfloat16']['sampling']
