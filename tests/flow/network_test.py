import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import perturbed, tiny

from tarflow_jax.flow.guidance import Guidance, Steering, guide
from tarflow_jax.flow.network import Network


@pytest.mark.parametrize('stretches', [(1, 1, 2, 12), (16,), (5, 11)])
@pytest.mark.parametrize('guidance', [None, Guidance(1.5, temperature=0.6)])
def test_by_stretches_it_predicts_what_the_block_does_at_once(stretches, guidance):
    with jax.enable_x64(True):
        model = tiny(dtype=jnp.float64)
        params = jax.tree.map(lambda x: x.astype(jnp.float64), perturbed(tiny())['params']['block_0'])
        block, labels = model.block_module(0), jnp.array([0, 2, -1])
        x = jax.random.normal(jax.random.key(1), (3, 16, 8), jnp.float64)
        network = Network.of(
            block, params, labels, False, Steering.of(guidance, 16), batch=3, cache_dtype=None
        )

        caches, found, start = network.grown(None, 16), [], 0
        for length in stretches:
            part = x[:, start : start + length].transpose(2, 0, 1)
            *predicted, caches = network.predict(part, start, caches)
            found.append(jnp.stack(predicted))
            start += length
        found = jnp.concatenate(found, 3).transpose(0, 2, 3, 1)

        predict = lambda *a: block.apply({'params': params}, x, *a, method='predictions')  # noqa: E731
        wanted = predict(labels)
        if guidance is not None:
            wanted = guide('both', 'linear', 1.5, wanted, predict(None, False, 0.6))
        # What the last position predicts is for none.
        np.testing.assert_allclose(found[:, :, :-1], jnp.stack(wanted)[:, :, :-1], rtol=0, atol=1e-12)
        # The last cache holds the keys of all positions, wherever they were cut.
        assert all((abs(cache.key).max((0, 1, 3)) > 0).all() for cache in caches)


def test_caches_grow_by_zeros():
    model = tiny()
    network = Network.of(
        model.block_module(0), perturbed(model)['params']['block_0'], None, False, Steering(),
        batch=2, cache_dtype=jnp.bfloat16,
    )
    *_, caches = network.predict(jnp.ones((8, 2, 3)), 0, network.grown(None, 4))
    for before, after in zip(caches, network.grown(caches, 9), strict=True):
        assert after.key.shape == after.value.shape == (2, 2, 9, 16)
        assert after.key.dtype == jnp.bfloat16
        np.testing.assert_array_equal(after.value[:, :, :4], before.value)
        assert not after.value[:, :, 3:].any()
