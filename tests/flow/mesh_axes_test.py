"""Meshes as jax.make_mesh makes them, with explicit axes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_flow import perturbed, tiny

import tarflow_jax as tfj


@pytest.fixture(scope='module')
def case():
    """A flow on one device: its variables, images, labels, and what is computed there."""
    model = tiny()
    variables, count = perturbed(model), 2 * jax.device_count()
    images = jax.random.normal(jax.random.key(1), (count, *model.example_shape))
    labels = jnp.arange(count) % 3
    z, _ = jax.jit(model.apply)(variables, images, labels)
    guidance = tfj.Guidance(1.0, rule='linear_sigma')
    wanted = {
        'apply': z,
        'log_prob': tfj.log_prob(model, variables, images, labels),
        'denoise': tfj.denoise(model, variables, images, labels, noise_std=0.1),
        'sample': tfj.sample(model, variables, z, labels, guidance=guidance),
    }
    return model, variables, images, labels, guidance, wanted


@pytest.mark.parametrize(
    'current', [pytest.param(False, marks=pytest.mark.slow), True], ids=['arrays only', 'set_mesh']
)
def test_everything_works_on_explicit_axes(case, current):
    model, variables, images, labels, guidance, wanted = case
    mesh = jax.make_mesh((jax.device_count(),), ('data',))
    split = NamedSharding(mesh, P('data'))
    variables = jax.device_put(variables, NamedSharding(mesh, P()))
    images, labels, z = jax.device_put((images, labels, wanted['apply']), split)

    def sample(**how):
        return tfj.sample(model, variables, z, labels, guidance=guidance, **how)

    with jax.set_mesh(mesh) if current else contextlib.nullcontext():
        initial = jax.jit(model.init)(jax.random.key(0), images)
        found = {
            'apply': jax.jit(model.apply)(variables, images, labels)[0],
            'log_prob': tfj.log_prob(model, variables, images, labels),
            'denoise': tfj.denoise(model, variables, images, labels, noise_std=0.1),
            'sample': sample(),
        }
        jacobi, log_prob, info = sample(
            method='jacobi', tolerance=1e-6, return_log_prob=True, return_info=True
        )
    assert jax.tree.structure(initial['params']) == jax.tree.structure(variables['params'])
    for name, value in found.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-4, err_msg=name)
        assert jax.typeof(value).sharding.spec[0] == 'data', name
    np.testing.assert_allclose(jacobi, wanted['sample'], atol=1e-4)
    assert log_prob.shape == labels.shape and (np.asarray(info.round_trip) < 1e-3).all()
