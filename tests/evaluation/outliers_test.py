"""Telling sets apart by log p, against flows and numbers whose answer is known."""

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_flow import tiny
from tiny_state import random_variables

from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation import outliers as module
from tarflow_jax.evaluation.outliers import auroc, histogram_picture, outliers, summary
from tarflow_jax.training import sharding

MODEL = tiny((1,))


def set_of(brightness, count=20, seed=0):
    """Images of about one brightness."""
    rng = np.random.default_rng(seed)
    pixels = brightness + rng.integers(-8, 9, (count, 8, 8, 2))
    return InMemory(pixels.astype(np.uint8), np.zeros(count, np.int32))


def identity():
    """Variables of the flow z = x: the likely images are grey."""
    return jax.tree.map(np.zeros_like, random_variables(MODEL))


def found_in(sets):
    return outliers(
        MODEL, identity(), sets, mesh=sharding.make_mesh(), batch_size=8, key=jax.random.key(0)
    )


def test_grey_flow():
    sets = {'train': set_of(128), 'test': set_of(128, seed=1), 'white': set_of(240)}
    found = found_in(sets)
    rows = {row['set']: row for row in found['sets']}
    assert list(rows)[:3] == ['train', 'test', 'white'] and len(rows) == 3 + len(module.CORRUPTIONS)
    # x = 0 has 0.5 log2(2 pi) + 7 bits per dimension; x = 0.88 has 0.5 * 0.88^2 / log(2) more.
    assert abs(rows['test']['bits_per_dim'] - (0.5 * np.log2(2 * np.pi) + 7)) < 0.01
    more = rows['white']['bits_per_dim'] - rows['test']['bits_per_dim']
    assert abs(more - 0.5 * 0.88**2 / np.log(2)) < 0.03
    assert rows['white']['auroc_low_log_p'] == rows['white']['auroc_atypical'] == 1.0
    assert 'auroc_low_log_p' not in rows['train'] and 'auroc_low_log_p' not in rows['test']
    # Smoother images are likelier, which low log p misses and atypical log p sees.
    blurred = rows['test, blurred']
    assert blurred['auroc_low_log_p'] < 0.1 and blurred['auroc_atypical'] > 0.9
    # The negative of grey is grey, and log p of this flow does not know up from down.
    assert abs(rows['test, upside down']['bits_per_dim'] - rows['test']['bits_per_dim']) < 1e-3
    for row in rows.values():
        np.testing.assert_allclose(sum(row['histogram']), 1)
    assert len(found['edges']) == module.BINS + 1


def test_labels_do_not_matter():
    sets = {'train': set_of(128), 'test': set_of(128, seed=1)}
    variables = random_variables(MODEL)
    bits = []
    for label in (0, 2):
        sets['test'].label_N[:] = label
        found = outliers(
            MODEL, variables, sets, mesh=sharding.make_mesh(), batch_size=8, key=jax.random.key(0)
        )
        bits.append(found['sets'][1]['bits_per_dim'])
    assert bits[0] == bits[1]


def test_features_do_not_matter_and_the_level_does():
    model = tiny((1,), num_features=2, noise_conditioned=True)
    variables = random_variables(model)

    class WithFeatures(InMemory):
        def __getitem__(self, i):
            return super().__getitem__(i) | {'features': np.full(2, self.label_N[i], np.float32)}

    bits = []
    for label, noise_std in ((0, 0.1), (2, 0.1), (2, 0.2)):
        sets = {}
        for name in ('train', 'test'):
            source = set_of(128, seed=len(name))
            sets[name] = WithFeatures(source.image_NxHxWxC, np.full(20, label, np.int32))
        found = outliers(
            model, variables, sets, mesh=sharding.make_mesh(), batch_size=8,
            key=jax.random.key(0), noise_std=noise_std,
        )
        bits.append(found['sets'][1]['bits_per_dim'])
    assert bits[0] == bits[1] != bits[2]


@pytest.mark.parametrize('width', [13, 22])
@pytest.mark.parametrize('kind', module.CORRUPTIONS)
def test_corruptions(kind, width):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 13, width, 2), np.uint8)
    source = InMemory(pixels, np.arange(3, dtype=np.int32))
    corrupted = module.corrupted(source, kind, seed=3)
    assert len(corrupted) == 3
    for i in range(3):
        before, after, again = source[i], corrupted[i], corrupted[i]
        np.testing.assert_array_equal(after['image'], again['image'])
        assert after['image'].shape == (13, width, 2) and after['image'].dtype == np.uint8
        assert after['label'] == before['label']
        assert (after['image'] != before['image']).any()
        if kind == 'shuffled':  # the same pixels elsewhere, and the 13th row and column in place
            for channel in range(2):
                np.testing.assert_array_equal(
                    np.sort(after['image'][..., channel].ravel()),
                    np.sort(before['image'][..., channel].ravel()),
                )
            np.testing.assert_array_equal(after['image'][12], before['image'][12])
            rest = width - width % 4
            np.testing.assert_array_equal(after['image'][:, rest:], before['image'][:, rest:])
        if kind == 'constant':
            assert (np.ptp(after['image'].reshape(-1, 2), axis=0) == 0).all()
        if kind == 'negative':
            np.testing.assert_array_equal(after['image'], 255 - before['image'])


def test_area_under_the_curve():
    assert auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0
    assert auroc(np.array([1.0, 3.0]), np.array([2.0, 1.0, 1.0])) == (0.5 * 2 / 3 + 1) / 2


def test_histogram_is_about_what_is_known():
    known = np.linspace(1, 2, 1001)
    bits = {'train': known, 'test': known, 'far': np.array([9e9, 0])}
    found = summary(bits)
    # The quantiles 0.005 and 0.995, and one and a half times their distance around.
    np.testing.assert_allclose(found['edges'][0], 1.005 - 1.5 * 0.99, atol=2e-3)
    np.testing.assert_allclose(found['edges'][-1], 1.995 + 1.5 * 0.99, atol=2e-3)
    train, test, far = found['sets']
    assert train['median'] == 1.5 and far['median'] == 4.5e9
    assert far['histogram'][-1] == 0.5 and sum(far['histogram']) == 1
    assert far['auroc_atypical'] == 1.0 and far['auroc_low_log_p'] == 0.5


def test_picture(tmp_path):
    found = summary({'train': np.array([1.0, 1.1]), 'test': np.array([1.0, 3.0, np.nan])})
    histogram_picture(found, tmp_path / 'outliers.png', width=300, row=60)
    picture = np.asarray(Image.open(tmp_path / 'outliers.png'))
    assert picture.shape == (30 + 2 * 60 + 40, 300, 3)
    blue = (picture == [0x1B, 0x6C, 0xA8]).all(-1)
    assert blue.any() and not blue[:, 150:].any()  # the first set is all in the left half
    assert not list(tmp_path.glob('*.tmp'))


def test_flow_that_has_diverged():
    with pytest.raises(ValueError, match='log p is not finite for any image'):
        summary({'train': np.array([np.nan]), 'test': np.array([np.inf])})
