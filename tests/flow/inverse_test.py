import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import perturbed, tiny

from tarflow_jax.flow.guidance import Steering
from tarflow_jax.flow.inverse import invert_block, prefixes


@pytest.mark.parametrize(
    'length, wanted',
    [
        (0, []),
        (1, [(0, 1)]),
        (15, [(0, 15)]),
        (48, [(0, 24), (24, 48)]),
        (63, [(0, 32), (32, 63)]),
        (1023, [(0, 256), (256, 512), (512, 768), (768, 1023)]),
    ],
)
def test_prefixes(length, wanted):
    assert prefixes(length) == wanted


def test_growing_prefixes_change_nothing(monkeypatch):
    model = tiny(image_size=20)  # 100 patches: four prefixes
    assert len(prefixes(model.num_patches - 1)) == 4
    params = perturbed(model)['params']['block_0']
    z = jax.random.normal(jax.random.key(0), (2, 100, 8))
    arguments = (model.block_module(0), params, z, jnp.array([1, -1]), np.bool_(False), Steering())
    x, logdet = invert_block(*arguments)
    # The forward pass, which knows no cache, takes it back.
    log_scale, shift = model.block_module(0).apply({'params': params}, x, arguments[3])
    np.testing.assert_allclose((x - shift) * jnp.exp(-log_scale), z, atol=2e-5)
    np.testing.assert_allclose(logdet, log_scale.sum((1, 2)), rtol=1e-5, atol=1e-4)


def test_one_patch_passes_through():
    model = tiny(image_size=2)
    params = perturbed(model)['params']['block_0']
    z = jax.random.normal(jax.random.key(0), (2, 1, 8))
    x, logdet = invert_block(model.block_module(0), params, z, None, np.bool_(False), Steering())
    np.testing.assert_array_equal(x, z)
    np.testing.assert_array_equal(logdet, 0)
