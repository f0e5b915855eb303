"""A block as a bijector, and what its condition adds to the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import ITARFLOW_CASES, case, relative_error
from tiny_flow import (
    CONDITIONED,
    PERMUTED,
    condition_for,
    noise_for,
    perturbed,
    sequence_flow,
    tiny,
    wide,
)

import tarflow_jax as tfj
from tarflow_jax.flow.block import noise_embedding, noise_features
from tarflow_jax.flow.order import reorder

ORDERS = [False, True, np.array([2, 0, 3, 1], np.int32)]


@pytest.fixture
def eager():
    """Operation by operation, in float64: nothing is compiled for one case alone."""
    with jax.enable_x64(True), jax.disable_jit():
        yield


def block_of(amount=0.3, **fields):
    flow = sequence_flow(dtype=jnp.float64, **fields)
    return flow.block(0), wide(perturbed(flow, amount=amount)['params']['block_0']), flow


def jacobian(function, x):
    """Of a function of [T, ...] to [T, ...]: does output t depend on input s? Both summed over."""
    found = abs(jax.jacfwd(function)(x))
    return found.sum(tuple(i for i in range(found.ndim) if i not in (0, found.ndim - x.ndim)))


@pytest.mark.parametrize('order', ORDERS, ids=str)
@pytest.mark.parametrize('first_token', ['identity', 'start'])
def test_a_block_looks_only_at_earlier_tokens(eager, first_token, order):
    block, params, flow = block_of(first_token=first_token)
    x = wide(noise_for(flow, 1))

    def outputs(x):
        affine = block.affine(params, x[None], None, order)
        return jnp.stack([affine.log_scale[0], affine.shift[0]], 1)

    depends = jacobian(outputs, x[0])
    assert np.array_equal(depends > 0, np.tril(np.ones((4, 4)), -1) > 0)
    # In raster order: a token depends on itself and on those before it in the block's order.
    z = jacobian(lambda x: block.forward(params, x[None], None, order)[0][0], x[0])
    places = np.asarray(reorder(jnp.arange(4)[None], order)[0])
    np.testing.assert_array_equal(z[np.ix_(places, places)] > 0, np.tril(np.ones((4, 4))) > 0)


@pytest.mark.parametrize('first_token', ['identity', 'start'])
def test_the_first_token(eager, first_token):
    block, params, flow = block_of(first_token=first_token)
    x = wide(noise_for(flow))
    affine = block.affine(params, x)
    if first_token == 'identity':
        assert block.calls == 3
        assert not affine.log_scale[:, 0].any() and not affine.shift[:, 0].any()
        np.testing.assert_array_equal(block.forward(params, x)[0][:, 0], x[:, 0])
    else:
        assert block.calls == 4
        assert abs(affine.shift[:, 0]).min() > 1e-3
        np.testing.assert_allclose(affine.shift[0, 0], affine.shift[1, 0])  # as nothing is before
        moved = {**params, 'start': params['start'] + 1}
        assert abs(block.affine(moved, x).shift - affine.shift).max((0, 2)).min() > 1e-3


@pytest.mark.parametrize('first_token', ['identity', 'start'])
@pytest.mark.parametrize('order', ORDERS, ids=str)
def test_features_of_a_token_reach_its_own_prediction_and_no_earlier_one(eager, first_token, order):
    block, params, flow = block_of(first_token=first_token, **CONDITIONED)
    x, condition = wide(noise_for(flow)), wide(condition_for(flow, per_token=True))
    features = reorder(condition.features[1:2], order)[0]  # in the block's own order

    def outputs(features):
        # Undoes the order: the block takes features in raster order.
        places = np.argsort(np.asarray(reorder(jnp.arange(4)[None], order)[0]))
        one = tfj.Condition(condition.labels[1:2], condition.noise_std[1:2], features[places][None])
        affine = block.affine(params, x[1:2], one, order)
        return jnp.concatenate([affine.log_scale[0], affine.shift[0]], 1)

    wanted = np.tril(np.ones((4, 4))) > 0
    if first_token == 'identity':
        wanted[0] = False  # passes through, whatever is known of it
    np.testing.assert_array_equal(jacobian(outputs, features) > 0, wanted)


@pytest.mark.parametrize('first_token', ['identity', 'start'])
def test_parts_of_a_condition_add_up(eager, first_token):
    block, params, flow = block_of(first_token=first_token, **CONDITIONED)
    c = wide(condition_for(flow))
    level = tfj.Condition(noise_std=c.noise_std)
    base = block.context(params, level)
    parts = [
        block.context(params, tfj.Condition(**{'noise_std': c.noise_std, name: getattr(c, name)})) - base
        for name in ('labels', 'features')
    ]
    np.testing.assert_allclose(block.context(params, c), base + sum(parts), atol=1e-12)
    assert all(abs(part)[1:].min(0).max() > 1e-2 for part in parts)
    # Label -1 and features of NaN are as if nothing was given.
    assert not parts[0][0].any() and not parts[1][0].any()


def test_features_of_an_example_reach_all_its_tokens(eager):
    block, params, flow = block_of(first_token='start', **CONDITIONED)
    c = wide(condition_for(flow, per_token=False))
    context = block.context(params, c)
    assert context.shape == (3, 1, 8)
    x = wide(noise_for(flow))
    with_, without = (
        block.affine(params, x, tfj.Condition(c.labels, c.noise_std, f)) for f in (c.features, None)
    )
    assert abs(with_.shift - without.shift)[1:].max(2).min() > 1e-3
    np.testing.assert_allclose(with_.shift[0], without.shift[0])


def test_features_that_are_not_there_give_no_gradient_of_nan(eager):
    block, params, flow = block_of(num_features=2)
    c = wide(condition_for(flow))

    gradient = jax.grad(lambda params: block.context(params, c).sum())(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    for name in ('feature_embedding', 'next_feature_embedding'):
        assert abs(gradient[name]['kernel']).min() > 0


@pytest.mark.parametrize('order', ORDERS, ids=str)
@pytest.mark.parametrize('fields', [
    {'first_token': 'start', 'scale': 'softplus'}, {'scale_limit': 0.7, **CONDITIONED},
    {'volume_preserving': True},
], ids=lambda fields: ' '.join(map(str, fields)))
def test_inverse_takes_the_forward_pass_back(order, fields):
    flow = sequence_flow(layers_per_block=(2, 2), **fields)
    block, params = flow.block(0), perturbed(flow, amount=0.3)['params']['block_0']
    x, condition = noise_for(flow), condition_for(flow)
    # Traced, so that orders of a kind share a program.
    order = np.bool_(order) if isinstance(order, bool) else order
    z, logdet = jax.jit(type(block).forward, static_argnums=0)(block, params, x, condition, order)
    back, inverse_logdet = block.inverse(params, z, condition, order)
    np.testing.assert_allclose(back, x, atol=2e-5)
    np.testing.assert_allclose(inverse_logdet, -logdet, atol=2e-5)
    assert abs(z - x).max() > 0.1
    assert 'volume_preserving' in fields or abs(logdet).min() > 0.01


def test_noise_features_of_a_level():
    found = noise_features(jnp.float32([0.05, 2.0]), 6)
    frequencies = 10_000.0 ** (-np.arange(3) / 3)
    angles = np.log([[0.05], [2.0]]) * frequencies
    np.testing.assert_allclose(found[:, :3], np.sin(angles), atol=1e-5)
    np.testing.assert_allclose(found[:, 3:], np.cos(angles), atol=1e-5)


@pytest.mark.parametrize('name', ITARFLOW_CASES)
def test_noise_embedding_of_the_official_code(name):
    recorded = case(name)
    level = jnp.asarray(recorded['t'])
    assert relative_error(noise_features(level, 64), recorded['time_features']) < 1e-5
    for b in range(len(recorded.model.layers_per_block)):
        params = recorded.variables['params'][f'block_{b}']['noise_embedding']
        assert relative_error(noise_embedding(params, level), recorded[f'time_embed_{b}']) < 1e-5


def test_equal_blocks_are_equal():
    model = tiny(layers_per_block=(2, 2, 1))
    assert model.block(0) == model.block(1) and hash(model.block(0)) == hash(model.block(1))
    assert model.block(0) != model.block(2)
    assert tiny((2, 1)).block(0) == model.block(0)
    permuted = sequence_flow(orders=PERMUTED)
    assert permuted.block(0) == sequence_flow().block(1)
