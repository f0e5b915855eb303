"""The train state is what its description says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_flow import tiny
from tiny_state import random_variables

from tarflow_jax.training.optimizer import adamw
from tarflow_jax.training.state import (
    abstract_state,
    from_variables,
    initial_state,
    parameter_count,
)

ADAMW = adamw(lambda k: 1e-3, clip_norm=1.0)


def described(tree):
    return {jax.tree_util.keystr(k): (v.shape, v.dtype) for k, v in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize('ema, volume_preserving', [
    (True, True), pytest.param(False, False, marks=pytest.mark.slow)
])
def test_abstract_state_is_that_of_a_real_one(ema, volume_preserving):
    model = tiny((1,), volume_preserving=volume_preserving)
    abstract = abstract_state(model, ADAMW, ema=ema)
    init = functools.partial(initial_state, model=model, optimizer=ADAMW, ema=ema)
    real = jax.jit(init)(jax.random.key(0))
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    assert described(abstract) == described(real)
    assert (abstract.ema_params is None) == (not ema)
    assert (abstract.prior is None) == (not volume_preserving)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))
    # step, skipped, AdamW's count and that of its schedule; everything else is float32.
    dtypes = sorted(str(leaf.dtype) for leaf in jax.tree.leaves(real))
    assert dtypes.count('int32') == 4 and set(dtypes) == {'int32', 'float32'}


def test_state_from_variables():
    model = tiny((2, 1), volume_preserving=True)
    variables = random_variables(model)
    state = from_variables(variables, optax.sgd(1.0), ema=True)
    assert described(state.params) == described(state.ema_params)
    for leaf, average in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema_params)):
        np.testing.assert_array_equal(leaf, average)
        # Two buffers: the train step is given both to write into.
        assert leaf.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()
    assert state.prior is variables['prior'] and int(state.step) == 0


def test_variables_are_the_averaged_ones_where_there_are_any():
    variables = random_variables(tiny((1,)))
    state = from_variables(variables, optax.sgd(1.0), ema=True)
    state = state._replace(ema_params=jax.tree.map(lambda x: x + 1, state.ema_params))
    assert state.variables() == {'params': state.ema_params}
    assert state._replace(ema_params=None).variables() == {'params': state.params}
    prior = {'variance': jnp.ones(3)}
    assert state._replace(prior=prior).variables()['prior'] is prior


def test_parameter_count_by_hand():
    # 8x8x2, patches of 2x2: T = 16, D = 8; width C = 32, 3 classes, blocks of 2 and 1 layers.
    T, D, C = 16, 8, 32
    layer = 2 * 2 * C + (C * 3 * C + 3 * C) + (C * C + C) + (C * 4 * C + 4 * C) + (4 * C * C + C)
    ends = (D * C + C) + T * C + 3 * C + (C * 2 * D + 2 * D)
    state = abstract_state(tiny((2, 1)), ADAMW, ema=True)
    assert parameter_count(state) == 3 * layer + 2 * ends
