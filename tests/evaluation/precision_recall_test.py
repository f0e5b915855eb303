"""Precision, recall, density and coverage against the definitions, in float64, and closed forms."""

import numpy as np
import pytest

from tarflow_jax.evaluation.precision_recall import precision_recall


def by_definition(real, generated, k, k_density):
    real, generated = real.astype(np.float64), generated.astype(np.float64)
    distances = lambda x, y: np.linalg.norm(x[:, None] - y, axis=-1)  # noqa: E731

    def radii(points, k):
        within = distances(points, points)
        np.fill_diagonal(within, np.inf)
        return np.sort(within, axis=1)[:, k - 1]

    between = distances(generated, real)
    closer = between < radii(real, k_density)
    return {
        'precision': (between <= radii(real, k)).any(1).mean(),
        'recall': (between <= radii(generated, k)[:, None]).any(0).mean(),
        'density': closer.sum() / (k_density * len(generated)),
        'coverage': closer.any(0).mean(),
    }


def normal(count, dim=8, seed=0, scale=1.0, offset=0.0):
    x = np.random.default_rng(seed).standard_normal((count, dim)) * scale + offset
    return x.astype(np.float32)


@pytest.mark.parametrize('block', [1, 7, 64, 1000])
@pytest.mark.parametrize('k, k_density', [(3, 5), (1, 2)])
def test_definition(block, k, k_density):
    real, generated = normal(90), normal(64, seed=1, scale=0.7, offset=0.3)
    found = precision_recall(real, generated, k=k, k_density=k_density, block=block)
    wanted = by_definition(real, generated, k, k_density)
    assert found == pytest.approx(wanted, abs=1e-12)
    assert 0.1 < wanted['recall'] < 0.9 and wanted['precision'] > wanted['recall']


def test_duplicates_count_as_neighbours():
    # Integers around 0, so that ties are ties in float32 and float64.
    rng = np.random.default_rng(0)
    half = np.repeat(rng.integers(-9, 10, (12, 3)), rng.integers(1, 5, 12), axis=0)
    real = np.concatenate([half, -half])
    generated = np.concatenate([half[::3], rng.integers(-9, 10, (30, 3))])
    found = precision_recall(real, generated, block=16)
    assert found == pytest.approx(by_definition(real, generated, 3, 5), abs=1e-12)
    # Four of a kind have balls of radius 0, which hold nothing but their like.
    doubled = np.repeat(normal(5, dim=300, offset=9.0), 4, axis=0)
    found = precision_recall(doubled, doubled[:12], block=8)
    assert (found['precision'], found['recall']) == (1.0, 0.6)


def test_identical_sets():
    x = normal(100, dim=32)
    found = precision_recall(x, x.copy(), block=32)
    assert (found['precision'], found['recall'], found['coverage']) == (1, 1, 1)
    # In every open ball: the image itself and the nearest four.
    assert found['density'] == pytest.approx(1.0, abs=1e-12)


def test_far_apart():
    found = precision_recall(normal(50), normal(60, offset=100.0))
    assert found == {'precision': 0, 'recall': 0, 'density': 0, 'coverage': 0}


def test_half_of_the_modes():
    # The generated images have one of two modes, and all of them lie in it.
    real = np.concatenate([normal(200), normal(200, seed=1, offset=50.0)])
    generated = real[:200] + normal(200, seed=2, scale=1e-3)
    found = precision_recall(real, generated, block=128)
    assert found['precision'] == 1 and found['recall'] == found['coverage'] == 0.5


def test_mean_far_from_the_origin():
    # 1e3 standard deviations: without centring, float32 would keep no digit of the distances.
    real, generated = normal(80), normal(70, seed=1, scale=0.7)
    wanted = precision_recall(real, generated)
    found = precision_recall(real.astype(np.float64) + 1024, generated.astype(np.float64) + 1024)
    assert found == pytest.approx(wanted, abs=0.03)


def test_refused():
    with pytest.raises(ValueError, match=r'real features are \[9, 2\] and the generated features \[9, 3\]'):
        precision_recall(np.zeros((9, 2)), np.zeros((9, 3)))
    with pytest.raises(ValueError, match=r'^5 real image\(s\) are too few for 5 nearest neighbours'):
        precision_recall(normal(5), normal(9))
    with pytest.raises(ValueError, match=r'^3 generated image\(s\) are too few for 3 nearest neighbours'):
        precision_recall(normal(9), normal(3))
    with pytest.raises(ValueError, match='the generated features are not all finite'):
        precision_recall(normal(9), normal(9) * np.nan)
