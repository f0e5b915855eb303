"""The passes of a TPU's float32 products, as `benchmarks/precision.py` makes them on a CPU."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import ROOT
from tiny_flow import noise_for, perturbed, sequence_flow

import tarflow_jax as tfj


@pytest.fixture(scope='module')
def precision():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'benchmarks'))
        yield importlib.import_module('precision')


def test_parts_add_up(precision):
    x = jax.random.normal(jax.random.key(0), (100,))
    found = precision.parts(x, 3)
    np.testing.assert_array_equal(sum(found[::-1]), x)
    for part in found:
        np.testing.assert_array_equal(part.astype(jnp.bfloat16).astype(jnp.float32), part)


@pytest.mark.parametrize('name, error', [('default', 3e-3), ('high', 1e-5), ('highest', 4e-7)])
def test_errors_of_a_product_and_its_gradients(precision, name, error):
    rng = np.random.default_rng(0)
    a, b, g = (rng.standard_normal(s) for s in ((3, 5, 64), (64, 32), (3, 5, 32)))

    def product(a, b):
        return precision.einsum('nsc,cd->nsd', a, b, precision=name)

    found, pull = jax.vjp(product, *(jnp.asarray(x, jnp.float32) for x in (a, b)))
    wanted = (a @ b, g @ b.T, np.einsum('nsc,nsd->cd', a, g))
    for x, y in zip((found, *pull(jnp.asarray(g, jnp.float32))), wanted):
        relative = np.linalg.norm(x - y) / np.linalg.norm(y)
        assert error / 30 < relative < error


def test_every_product_of_a_flow(precision):
    model = sequence_flow()
    variables, x = perturbed(model), noise_for(model)
    wanted = tfj.log_prob(model, variables, x)
    with precision.as_on_a_tpu():
        errors = [
            abs(tfj.log_prob(model.clone(precision=name), variables, x) - wanted).max()
            for name in ('highest', 'default')
        ]
    assert errors[0] < 1e-5 < 1e-4 < errors[1]
