"""Scores of a whole set: order, padding, draws, and keys that know nothing of batches."""

import jax
import numpy as np
import pytest

from tarflow_jax.data.sources import InMemory
from tarflow_jax.training import sharding
from tarflow_jax.training.over_set import evenly_spaced, over_set

SOURCE = InMemory(
    np.arange(21 * 4, dtype=np.uint8).reshape(21, 2, 2, 1), np.arange(21, dtype=np.int32)
)


@jax.jit
def score(batch, keys):
    draw = jax.vmap(jax.random.normal)(keys)
    return {'first': batch['image'][:, 0, 0, 0], 'label': batch['label'], 'draw': draw}


def found(batch_size, draws=2, devices=None):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return over_set(
        score, SOURCE, mesh=mesh, batch_size=batch_size, key=jax.random.key(5), draws=draws, what=''
    )


@pytest.mark.parametrize('batch_size', [1, 8, 21, 50])
def test_every_image_once_in_order(batch_size):
    scores = found(batch_size)
    np.testing.assert_array_equal(scores['label'], [np.arange(21)] * 2)
    np.testing.assert_array_equal(scores['first'], [np.arange(21) * 4] * 2)


def test_keys_depend_on_the_draw_and_the_place_alone():
    draws = found(8)['draw']
    of_draw = jax.random.fold_in(jax.random.key(5), 1)
    wanted = [jax.random.normal(jax.random.fold_in(of_draw, i)) for i in range(21)]
    np.testing.assert_allclose(draws[1], wanted, rtol=1e-6)
    for batch_size, devices in ((3, 1), (16, 2), (40, 8)):
        np.testing.assert_array_equal(found(batch_size, devices=devices)['draw'], draws)
    assert len(np.unique(draws)) == 42


def test_evenly_spaced():
    few = evenly_spaced(SOURCE, 5)
    assert [int(few[i]['label']) for i in range(len(few))] == [0, 4, 8, 12, 16]
    assert len(evenly_spaced(SOURCE, 100)) == 21
    assert [int(evenly_spaced(SOURCE, 100)[i]['label']) for i in range(21)] == list(range(21))
