"""The arrays of a flow: their tree, their distributions, and how few draws make them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import CONDITIONED, sequence_flow, tiny

from tarflow_jax.flow import parameters
from tarflow_jax.flow.parameters import Parameter, abstract, initialize, is_parameter, linear

KEY = jax.random.key(0)
TREE = {
    'uniform': Parameter((40, 50), ('a', 'b'), 'uniform', 0.3),
    'other': Parameter((40, 50), ('a', 'b'), 'uniform', 0.3),
    'normal': Parameter((2000,), ('a',), 'normal', 0.01),
    'zeros': Parameter((3,), ('a',), 'zeros'),
    'ones': Parameter((3,), ('a',), 'ones'),
    'layers': Parameter((2000,), ('a',), 'uniform', 2.0).stacked(3),
}


@pytest.fixture(params=[2**26, 2500, 100], ids=['together', 'in groups', 'alone'])
def drawn(request, monkeypatch):
    """Of one call, of calls for groups, and of a call for each array."""
    monkeypatch.setattr(parameters, '_DRAWN_TOGETHER', request.param)
    return jax.tree.map(np.asarray, initialize(KEY, TREE))


def test_distributions(drawn):
    for name, bound in (('uniform', 0.3), ('layers', 2.0)):
        x = drawn[name]
        assert 0.99 * bound < abs(x).max() <= bound
        # Four standard deviations of the mean and of the standard deviation.
        assert abs(x.mean()) < 4 * bound / np.sqrt(3 * x.size)
        assert abs(x.std() * np.sqrt(3) / bound - 1) < 4 * np.sqrt(0.2 / x.size)
    x = drawn['normal'] / 0.01
    assert abs(x.mean()) < 4 / np.sqrt(x.size) and abs(x.std() - 1) < 4 / np.sqrt(2 * x.size)
    assert abs((x**4).mean() - 3) < 4 * np.sqrt(96 / x.size)  # the kurtosis of a normal distribution
    assert 2.5 < abs(x).max() < 6
    np.testing.assert_array_equal(drawn['zeros'], 0)
    np.testing.assert_array_equal(drawn['ones'], 1)
    assert {x.dtype for x in jax.tree.leaves(drawn)} == {np.dtype('float32')}


def test_leaves_and_layers_are_independent(drawn):
    rows = [drawn[name].ravel() for name in ('uniform', 'other', 'normal')] + [*drawn['layers']]
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert abs(correlation).max() < 4.5 / np.sqrt(2000)


def test_keys_decide():
    one, same, other = (initialize(jax.random.key(k), TREE) for k in (0, 0, 1))
    np.testing.assert_array_equal(one['uniform'], same['uniform'])
    assert abs(np.corrcoef(one['uniform'].ravel(), other['uniform'].ravel())[0, 1]) < 0.1


def test_no_draw_reaches_the_infinite_quantile(monkeypatch):
    lowest = parameters._uniform(KEY, (2,)) * 0 + np.nextafter(np.float32(-1), np.float32(0))
    found = parameters._scaled(lowest, Parameter((2,), ('a',), 'normal'))
    assert np.isfinite(found).all() and found.min() < -5
    assert parameters._uniform(KEY, (10**6,)).min() > -1


@pytest.mark.parametrize('flow', [
    tiny((1, 3), volume_preserving=True), sequence_flow(first_token='start', **CONDITIONED),
], ids=['images', 'sequences'])
def test_init_gives_the_tree_of_parameters(flow):
    examples = jnp.zeros((1, *flow.example_shape))
    shapes = jax.eval_shape(flow.init, KEY, examples)
    assert jax.tree.structure(shapes['params']) == jax.tree.structure(abstract(flow.parameters()))
    jax.tree.map(
        lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or pytest.fail(f'{a} {b}'),
        shapes['params'], abstract(flow.parameters()),
    )
    assert set(shapes) == ({'params', 'prior'} if flow.volume_preserving else {'params'})
    for p in jax.tree.leaves(flow.parameters(), is_leaf=is_parameter):
        assert len(p.axes) == len(p.shape) and len(set(p.axes)) == len(p.axes)


def test_stacked_and_linear():
    one = Parameter((2, 3), ('a', 'b'), 'normal', 0.5)
    assert one.stacked(4) == Parameter((4, 2, 3), ('layers', 'a', 'b'), 'normal', 0.5)
    assert one.stacked(4).size == 24
    found = linear({'a': 4, 'b': 4}, {'c': 3}, bias='d')
    assert found['kernel'] == Parameter((4, 4, 3), ('a', 'b', 'c'), 'uniform', 0.25)
    assert found['bias'] == Parameter((3,), ('d',), 'uniform', 0.25)
    assert linear({'a': 4}, {'b': 1}, zero_kernel=True)['kernel'].init == 'zeros'


@pytest.mark.parametrize('depth', [1, 12])
def test_few_random_draws_are_compiled_whatever_the_depth(depth):
    flow = tiny((depth,) * 4)
    program = str(jax.make_jaxpr(flow.init)(KEY, jnp.zeros((1, 8, 8, 2))))
    # One draw, and a key folded from that of the caller for it, another by Flax for its streams.
    assert program.count('random_bits') <= 2
    assert 0 < program.count('random_bits')


def test_it_starts_near_the_identity():
    # proj_out's kernel is zero: all that is left is its bias, within 1/sqrt(width).
    model = tiny()
    variables = {'params': initialize(KEY, model.parameters())}
    for block in variables['params'].values():
        assert not block['proj_out']['kernel'].any()
        assert 0.1 < np.abs(block['proj_out']['bias']).max() <= model.width**-0.5
        assert 0.005 < block['position_embedding'].std() < 0.02
        kernel = np.asarray(block['layers']['mlp_out']['kernel'])
        assert 0.95 / np.sqrt(128) < np.abs(kernel).max() <= 1 / np.sqrt(128)
