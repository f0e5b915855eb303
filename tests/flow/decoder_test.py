"""One step after another over the cache against the whole sequence at once, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import (
    CONDITIONED,
    PERMUTED,
    condition_for,
    noise_for,
    normal,
    perturbed,
    sequence_flow,
    tiny,
    wide,
)

import tarflow_jax as tfj
from tarflow_jax.flow.condition import drop
from tarflow_jax.flow.decoder import Decoder, begin, prefixes
from tarflow_jax.flow.guidance import RULES, GuidanceParams
from tarflow_jax.flow.order import reorder

GUIDANCES = {
    'unguided': None,
    'annealed': tfj.Guidance(1.5, temperature=0.6, annealed=True),
    'linear_sigma': tfj.Guidance(0.8, rule='linear_sigma'),
}


@pytest.mark.parametrize('stretches', [(1, 1, 1, 1), (1, 3), (4,)], ids=str)
@pytest.mark.parametrize('name', GUIDANCES)
@pytest.mark.parametrize('first_token', ['identity', 'start'])
def test_by_stretches_it_predicts_what_the_block_does_at_once(stretches, name, first_token):
    # Operation by operation, which all cases share, nothing is compiled for one of them alone.
    with jax.enable_x64(True), jax.disable_jit():
        model = sequence_flow(
            first_token=first_token, orders=PERMUTED, dtype=jnp.float64, **CONDITIONED
        )
        params, block = wide(perturbed(model, amount=0.3)['params']['block_0']), model.block(0)
        order, condition = model.block_orders()[0], wide(condition_for(model))
        x, guidance = reorder(wide(noise_for(model)), order), GUIDANCES[name]
        decoder = Decoder.of(
            block, params, condition, order, GuidanceParams.of(guidance, 4), batch=3
        )

        entries = begin(block, params, x.transpose(1, 2, 0))
        caches, parts, start = decoder.pad_caches(None, 4), [], 0
        for length in stretches:
            part = entries[start : start + length].transpose(1, 2, 0)
            predicted, caches = decoder.step(part, start, caches)
            parts.append(predicted)
            start += length
        found = [jnp.concatenate(part, 2).transpose(1, 2, 0) for part in list(zip(*parts))[:2]]

        wanted = block.affine(params, x, condition, order)
        if guidance is not None:
            weights = guidance.weight * (jnp.arange(4)[:, None] / 3 if guidance.annealed else 1.0)
            weaker = block.affine(
                params, x, drop(condition, jnp.ones(3, bool)), order, guidance.temperature
            )
            assert abs(wanted.shift - weaker.shift).max() > 1e-2
            wanted = RULES[guidance.rule](weights, wanted, weaker)
        # Without a start token, what the last position predicts is for none.
        first = int(first_token == 'identity')
        for one, other in zip(found, wanted):
            np.testing.assert_allclose(one[:, : 4 - first], other[:, first:], rtol=0, atol=1e-12)
        # The last cache holds the keys of all positions, wherever they were cut.
        assert all((abs(cache.key).max((0, 1, 3)) > 0).all() for cache in caches)


def test_caches_grow_by_zeros():
    model = tiny()
    decoder = Decoder.of(
        model.block(0), perturbed(model)['params']['block_0'], None, False, GuidanceParams(),
        batch=2, cache_dtype=jnp.bfloat16,
    )
    _, caches = decoder.step(jnp.ones((8, 2, 3)), 0, decoder.pad_caches(None, 4))
    for before, after in zip(caches, decoder.pad_caches(caches, 9), strict=True):
        assert after.key.shape == after.value.shape == (2, 2, 9, 16)
        assert after.key.dtype == jnp.bfloat16
        np.testing.assert_array_equal(after.value[:, :, :4], before.value)
        assert not after.value[:, :, 3:].any()


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


def test_growing_prefixes_change_nothing():
    model = tiny((1,), image_size=20)  # 100 patches: four prefixes
    block, params = model.block(0), perturbed(model)['params']['block_0']
    assert len(prefixes(block.calls)) == 4
    z, labels = normal(0, 2, 100, 8), jnp.array([1, -1])
    x, logdet = block.inverse(params, z, labels, np.bool_(False))
    # The forward pass, which knows no cache, takes it back.
    back, forward_logdet = jax.jit(block.forward)(params, x, labels)
    np.testing.assert_allclose(back, z, atol=2e-5)
    np.testing.assert_allclose(logdet, -forward_logdet, rtol=1e-5, atol=1e-4)
    assert abs(logdet).min() > 1


def test_caches_of_another_type():
    model = tiny((1,))
    block, params = model.block(0), perturbed(model)['params']['block_0']
    z = noise_for(model, 2)
    exact, _ = block.inverse(params, z, None, np.bool_(False))
    narrow, _ = block.inverse(params, z, None, np.bool_(False), cache_dtype=jnp.bfloat16)
    assert 1e-5 < abs(narrow - exact).max() < 0.05


def test_two_tokens_in_bfloat16():
    # One step: XLA's CPU backend has no bfloat16 products in a loop that it removes.
    model = tiny((1,), image_size=(2, 4), dtype=jnp.bfloat16)
    assert model.block(0).calls == 1
    variables, z = perturbed(model), noise_for(model)
    exact = tfj.sample(model.clone(dtype=jnp.float32), variables, z)
    assert 0 < np.abs(tfj.sample(model, variables, z) - exact).max() < 0.05
