"""The order of classes: which row of the tables each class of a set has."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_flow import tiny

from tarflow_jax import class_order
from tarflow_jax.class_order import SORTED, Classes
from tarflow_jax.data import sources
from tarflow_jax.training import sharding

PHOTOGRAPHS = 'photographs/torchvision'
SITE = ['n3', 'n1', 'n2']  # in the order of map_clsloc.txt, so to speak
ANIMALS = ['cat', 'dog', 'wild']


@pytest.mark.parametrize('flow, data, rows', [
    (Classes(SORTED), Classes(SITE, 'imagenet_resized'), [2, 0, 1]),
    (Classes(SORTED), Classes(sorted(SITE), PHOTOGRAPHS), None),
    (Classes(SITE), Classes(sorted(SITE), PHOTOGRAPHS), [1, 2, 0]),
    (Classes(SITE), Classes(SITE), None),
    # Nothing is known of a flow of version 0.1.
    (Classes(None), Classes(SITE), None),
    # Labels that are numbers of the files mean the same to all.
    (Classes(SORTED), Classes(sources.FASHION_MNIST, 'embedded'), None),
    (Classes(SORTED), Classes(None, 'idx'), None),
    (Classes(sources.FASHION_MNIST, 'embedded'), Classes(None, 'idx'), None),
])
def test_rows(flow, data, rows):
    found = class_order.rows(flow, data, 'the flow')
    assert found is None if rows is None else found.tolist() == rows


@pytest.mark.parametrize('flow, data, says', [
    (Classes(SORTED), Classes(None, 'imagenet_resized'), r'by sorted name, .* map_clsloc.txt'),
    (Classes(SITE), Classes(None, 'imagenet_resized'), 'in the order of its training, .* another --out'),
    (Classes(ANIMALS), Classes(SITE), r"3 classes .* has 3, and they differ \('cat' is only in the "
     r"first, 'n3' only in the second\)"),
    (Classes(ANIMALS), Classes(ANIMALS[:2]), "'wild' is only in the first, None only in"),
])
def test_what_cannot_be_compared(flow, data, says):
    with pytest.raises(ValueError, match=f'^the flow .*{says}'):
        class_order.rows(flow, data, 'the flow')


def test_official_rows():
    rows, names = class_order.official_rows(Classes(SITE, 'imagenet_resized'))
    assert rows.tolist() == [1, 2, 0] and names == ['n1', 'n2', 'n3']
    own = sources.FASHION_MNIST
    assert class_order.official_rows(Classes(own, 'embedded')) == (None, own)
    assert class_order.official_rows(Classes(SORTED)) == (None, None)


def test_reorder_leaves_everything_else_where_it_is():
    model = tiny((1, 1))
    variables = model.init(jax.random.key(0), np.zeros((1, *model.image_shape), np.float32))
    host = jax.tree.map(np.asarray, variables)
    mesh = sharding.make_mesh()
    placed = jax.device_put(host, sharding.shardings(host, mesh))
    rows = np.array([2, 0, 1])
    for given in (host, placed):
        found = class_order.reorder(given, rows)
        for (path, before), after in zip(jax.tree.leaves_with_path(given), jax.tree.leaves(found)):
            taken = rows if path[-1].key == 'class_embedding' else slice(None)
            np.testing.assert_array_equal(np.asarray(after), np.asarray(before)[taken])
            assert type(after) is type(before)
            assert not isinstance(after, jax.Array) or after.sharding == before.sharding
    assert class_order.reorder(host, None) is host


def at_hand(monkeypatch, found, classes=3):
    """What becomes of an official checkpoint whose row k is k; `found` is the set's or an error."""
    def known(*_, **__):
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(sources, 'classes', known)
    origin = {'name': 'model.pth'}
    variables, known = class_order.at_hand(
        ConfigDict(dict(source='prepared', path='', name='')), tiny((1,), num_classes=classes),
        {'params': {'block_0': {'class_embedding': np.arange(classes)}}}, Classes(SORTED), origin,
    )
    return variables['params']['block_0']['class_embedding'].tolist(), known, origin


def test_an_official_order_gives_way_to_the_set_at_hand(monkeypatch):
    table, known, origin = at_hand(monkeypatch, (SITE, 'imagenet_resized'))
    assert table == [2, 0, 1] and known == Classes(SITE, 'imagenet_resized')
    assert origin['class_order'] == 'changed to that of the set'
    # The set is not here.
    table, known, origin = at_hand(monkeypatch, FileNotFoundError())
    assert table == [0, 1, 2] and known == Classes(SORTED) and 'class_order' not in origin
    # Numbers of other files, such as the embedded ones that configs have by default.
    table, known, _ = at_hand(monkeypatch, (sources.FASHION_MNIST, 'embedded'))
    assert table == [0, 1, 2] and known.names is None
    with pytest.raises(ValueError, match='num_classes = 4, but the dataset of data.path has 3 classes'):
        at_hand(monkeypatch, (SITE, 'imagenet_resized'), classes=4)
    with pytest.raises(ValueError, match='has no class names'):
        at_hand(monkeypatch, (None, 'imagenet_resized'))


def test_training_goes_on_with_the_same_order_only():
    class_order.check_same(Classes(SITE), Classes(SITE), 'run')
    with pytest.raises(ValueError, match='run numbers its classes in another order'):
        class_order.check_same(Classes(SITE), Classes(sorted(SITE), PHOTOGRAPHS), 'run')
    with pytest.raises(ValueError, match='converted again'):
        class_order.check_same(Classes(SORTED), Classes(SITE, 'imagenet_resized'), 'run')
