import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.flow.order import orders_of, reorder, restore, shift_right

X = jnp.arange(2 * 4 * 3).reshape(2, 4, 3)
PERMUTATION = np.array([2, 0, 3, 1], np.int32)


@pytest.mark.parametrize('order, places', [
    (False, [0, 1, 2, 3]), (True, [3, 2, 1, 0]), (np.bool_(True), [3, 2, 1, 0]),
    (np.bool_(False), [0, 1, 2, 3]), (PERMUTATION, PERMUTATION),
], ids=str)
def test_first_entry_is_the_token_that_comes_first(order, places):
    np.testing.assert_array_equal(reorder(X, order), X[:, np.array(places)])
    np.testing.assert_array_equal(restore(reorder(X, order), order), X)
    np.testing.assert_array_equal(reorder(X[0], order, axis=0), X[0][np.array(places)])


@pytest.mark.parametrize('order', [np.bool_(True), PERMUTATION], ids=str)
def test_orders_may_be_traced(order):
    np.testing.assert_array_equal(jax.jit(reorder)(X, order), reorder(X, order))
    np.testing.assert_array_equal(jax.jit(restore)(X, order), restore(X, order))


def test_shift_right():
    np.testing.assert_array_equal(shift_right(X)[:, 1:], X[:, :-1])
    np.testing.assert_array_equal(shift_right(X)[:, 0], 0)


def test_alternate():
    orders = orders_of('alternate', 3, 4)
    assert [bool(order) for order in orders] == [False, True, False]
    assert all(order.dtype == bool for order in orders)


def test_raster_and_reversed_permutations_share_the_program_of_alternate():
    raster, backwards, other = orders_of((range(4), range(3, -1, -1), PERMUTATION), 3, 4)
    assert raster.dtype == backwards.dtype == bool and not raster and backwards
    assert other.dtype == np.int32
    np.testing.assert_array_equal(other, PERMUTATION)


@pytest.mark.parametrize('orders, words', [
    ('sideways', "orders 'sideways' must be 'alternate', or have one permutation for each of the 2"),
    ((range(4),), "orders for 1 blocks must be 'alternate'"),
    ((range(4), range(3)), r'orders\[1\] is not a permutation of the 4 tokens'),
    ((range(4), (0, 1, 2, 2)), r'orders\[1\] is not a permutation'),
    (((1, 2, 3, 4), range(4)), r'orders\[0\] is not a permutation'),
])
def test_what_is_no_order(orders, words):
    with pytest.raises(ValueError, match=words):
        orders_of(orders, 2, 4)
