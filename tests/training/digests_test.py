"""Checksums of arrays: any number and place matters, where the arrays are does not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.training import digests, sharding

X = np.random.default_rng(0).standard_normal((64, 8192)).astype(np.float32)  # 2 MiB


def test_names_and_kinds():
    tree = {'a': np.zeros((2, 3), np.int32), 'b': (jnp.bfloat16(1.0), [np.zeros(0, bool)])}
    found = digests.digests(tree)
    assert list(found) == ['a', 'b/0', 'b/1/0']
    assert [text.rpartition(' ')[0] for text in found.values()] == [
        'int32 2x3', 'bfloat16 scalar', 'bool 0'
    ]
    assert digests.kinds(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))) == digests.kinds(tree)


@pytest.mark.parametrize('axes', [{}, {'fsdp': 8}, {'tensor': 4}, {'data': 2, 'fsdp': 4}])
def test_where_an_array_is_does_not_matter(axes):
    mesh = sharding.make_mesh(**axes)
    names = [name for name, size in mesh.shape.items() if size > 1]
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names[-2:]))
    assert digests.digests(jax.device_put(X, place)) == digests.digests(X)
    small = X[:, :8]
    assert digests.digests(jax.device_put(small, place)) == digests.digests(small)


@pytest.mark.parametrize('dtype', [np.float32, np.int32, jnp.bfloat16, np.uint8])
def test_every_bit_and_place_counts(dtype):
    x = (100 * np.abs(X)).astype(dtype)
    there = digests.sums_of_hashes(jnp.asarray(x))
    assert there == digests.sums_of_hashes(x) or x.nbytes < 2**20
    rng = np.random.default_rng(1)
    seen = {there}
    for _ in range(20):
        other = x.copy()
        bits = other.view(np.uint8).reshape(-1)
        bits[rng.integers(bits.size)] ^= 1 << rng.integers(8)
        seen.add(digests.sums_of_hashes(other))
    for other in (x[::-1], x[:, ::-1], np.zeros_like(x), np.ones_like(x)):
        seen.add(digests.sums_of_hashes(other))
    assert len(seen) == 25
