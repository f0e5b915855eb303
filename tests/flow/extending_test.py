"""The flow of docs/extending.md, with a conditioning signal of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import ROOT, fenced, run_python
from tiny_flow import apply
from tiny_state import random_variables

import tarflow_jax as tfj

PAGE = ROOT / 'docs' / 'extending.md'
SIGNAL = jnp.array([0.2, 0.9, -1.0])


@pytest.fixture(scope='module')
def page():
    return run_python(PAGE, {'range(1500)': 'range(2)'})


@pytest.fixture(scope='module')
def flow(page):
    """Far from the identity, and small enough for its Jacobian."""
    model = page['BrightnessFlow'](8, 1, patch_size=2, width=32, layers_per_block=(1, 2), head_dim=16)
    return model, random_variables(model)


def noise_for(model, count=3):
    return jax.random.normal(jax.random.key(3), (count, model.num_patches, model.patch_dim))


def test_is_under_40_lines():
    lines = [line for block in fenced(PAGE) for line in block.text.splitlines()]
    own = [line for line in lines if line.strip() and not line.startswith(('import', 'from'))]
    assert len(own) < 40


def test_the_page_runs(page):
    assert page['images'].shape == (16, 28, 28, 1)
    assert np.isfinite(page['images']).all() and np.isfinite(page['metrics']['loss'])


def test_blocks_differ_from_those_of_a_plain_flow(flow):
    model, variables = flow
    plain = tfj.TarFlow(**{
        f.name: getattr(model, f.name) for f in dataclasses.fields(tfj.TarFlow)
        if f.init and f.name not in ('name', 'parent')
    })
    assert model != plain and not plain.conditional
    assert 'signal' in variables['params']['block_0']
    assert 'signal' not in random_variables(plain)['params']['block_0']


def test_the_signal_changes_the_latents_and_minus_one_is_none(flow):
    model, variables = flow
    images = jax.random.normal(jax.random.key(1), (3, 8, 8, 1))
    none, _ = apply(model, variables, images)
    given, _ = apply(model, variables, images, SIGNAL)
    assert abs(given - none).max((1, 2))[:2].min() > 1e-2
    np.testing.assert_allclose(given[2], none[2], atol=1e-6)


def test_log_determinant_is_that_of_the_jacobian(flow):
    model, variables = flow
    images = jax.random.normal(jax.random.key(1), (1, 8, 8, 1))

    def latents(x):
        return model.apply(variables, x.reshape(images.shape), SIGNAL[:1])[0].ravel()

    jacobian = jax.jit(jax.jacobian(latents))(images.ravel())
    _, logdet = apply(model, variables, images, SIGNAL[:1])
    assert np.linalg.slogdet(jacobian)[1] == pytest.approx(float(logdet[0]), abs=1e-3)


@pytest.mark.parametrize('guidance', [None, tfj.Guidance(1.0), tfj.Guidance(0.5, temperature=0.8)])
@pytest.mark.parametrize('method', ['sequential', 'jacobi', 'gs_jacobi'])
def test_sampling_inverts(flow, method, guidance):
    model, variables = flow
    images, info = tfj.sample(
        model, variables, noise_for(model), SIGNAL, guidance=guidance, method=method, segments=2,
        tolerance=1e-6, return_info=True,
    )
    assert float(jnp.max(info.round_trip)) < 1e-3
    if guidance is None:
        z, _ = apply(model, variables, images, SIGNAL)
        np.testing.assert_allclose(z, noise_for(model), atol=1e-3)


def test_automatic_sampling_with_guidance(flow):
    model, variables = flow
    guidance = tfj.Guidance(1.0)
    schedule = tfj.calibrate(model, variables, SIGNAL, guidance=guidance)
    given = dict(guidance=guidance, return_info=False)
    images = tfj.sample(
        model, variables, noise_for(model), SIGNAL, method='auto', schedule=schedule, **given
    )
    expected = tfj.sample(model, variables, noise_for(model), SIGNAL, **given)
    np.testing.assert_allclose(images, expected, atol=1e-3)


def test_a_plain_flow_without_classes_still_refuses_guidance_without_a_temperature():
    model = tfj.TarFlow(8, 1, patch_size=2, width=32, layers_per_block=(1,), head_dim=16)
    with pytest.raises(ValueError, match='needs class labels or a temperature'):
        tfj.sample(
            model, random_variables(model), noise_for(model), SIGNAL, guidance=tfj.Guidance(1.0)
        )


def test_official_files_have_no_place_for_it(flow, tmp_path):
    model, variables = flow
    with pytest.raises(ValueError, match='signal'):
        tfj.save_official(variables, model, tmp_path / 'model.safetensors')


@pytest.mark.slow
def test_images_are_as_bright_as_asked_for():
    page = run_python(PAGE, {'range(1500)': 'range(1500)'})
    brightness = (jnp.clip(page['images'], -1, 1).mean((1, 2, 3)) + 1) / 2
    assert np.corrcoef(page['asked'], brightness)[0, 1] > 0.9
