"""The Frechet distance against closed forms, and sums against numpy's own statistics."""

import numpy as np
import pytest

from tarflow_jax.evaluation.frechet import Statistics, Sums, frechet_distance


def features(count, dim=6, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(7).standard_normal((dim, dim))
    return rng.standard_normal((count, dim)) @ mixing + offset


def statistics_of(features):
    sums = Sums(features.shape[1])
    sums.add(features)
    return sums.statistics({})


def test_sums_in_batches_are_those_of_numpy():
    # An offset of 1e5 standard deviations: E[x x^T] - m m^T would keep 6 digits.
    x = features(100, offset=1e5)
    sums = Sums(6)
    for part in np.split(x, [1, 8, 8, 50]):
        sums.add(part)
    found = sums.statistics({'split': 'test'})
    assert found.count == 100 and found.about == {'split': 'test'}
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-10)
    plain = (x.T @ x - 100 * np.outer(x.mean(0), x.mean(0))) / 99
    assert abs(plain - np.cov(x, rowvar=False)).max() > 1e-6


def test_float32_features_are_summed_in_float64():
    x = features(1000, offset=3.0).astype(np.float32)
    found, wide = statistics_of(x), x.astype(np.float64)
    np.testing.assert_allclose(found.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(found.covariance, np.cov(wide, rowvar=False), rtol=1e-10, atol=1e-12)


def test_distance_of_diagonal_covariances():
    a = Statistics(None, np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 0.0]))
    b = Statistics(None, np.array([1.0, 0.0, 3.5]), np.diag([9.0, 1.0, 0.25]))
    # Means 4 + 0.25; standard deviations 1, 2, 0 and 3, 1, 0.5: 4 + 1 + 0.25.
    assert frechet_distance(a, b) == pytest.approx(9.5, rel=1e-14)
    assert frechet_distance(b, a) == pytest.approx(9.5, rel=1e-14)


def test_distance_of_rotated_covariances():
    # C and A C A of commuting A: the optimal map is A, so the distance is tr C (1 - A)^2.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((8, 8)))[0]
    variances, map_ = rng.uniform(0.1, 2, 8), rng.uniform(0.5, 3, 8)
    covariance = lambda values: (basis * values) @ basis.T  # noqa: E731
    a = Statistics(None, np.zeros(8), covariance(variances))
    b = Statistics(None, np.zeros(8), covariance(variances * map_**2))
    wanted = (variances * (1 - map_) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-12)


def test_distance_where_the_optimal_map_does_not_commute():
    # For any symmetric positive A, x -> A x is the optimal map from C to A C A.
    rng = np.random.default_rng(1)
    mix, root = rng.standard_normal((2, 6, 6))
    c, a = mix @ mix.T, root @ root.T
    found = frechet_distance(
        Statistics(None, np.zeros(6), c), Statistics(None, np.ones(6), a @ c @ a)
    )
    rest = np.eye(6) - a
    assert found == pytest.approx(6 + np.trace(rest @ c @ rest), rel=1e-10)


@pytest.mark.parametrize('count', [2, 10, 40, 400])
def test_a_set_against_itself(count):
    one = statistics_of(features(count, dim=40, offset=2.0))
    found = frechet_distance(one, one)
    assert 0 <= found < 1e-12 * np.trace(one.covariance)


def test_fewer_images_than_dimensions():
    # The second set is the first, stretched by 2 along its first axis and moved by 1 along it.
    x = np.random.default_rng(0).standard_normal((10, 64)) * 100
    x[:, 0] = np.linspace(-1, 1, 10)
    x[:, 1:] -= np.outer(x[:, 0], x[:, 0] @ x[:, 1:]) / (x[:, 0] @ x[:, 0])  # uncorrelated
    y = x.copy()
    y[:, 0] = 2 * x[:, 0] + 1
    found = frechet_distance(statistics_of(x), statistics_of(y))
    # Traces of 6e5: the square root of the rounding would be 1e-2.
    assert found == pytest.approx(1 + x[:, 0].var(ddof=1), rel=1e-8)


def test_points_without_spread():
    a = Statistics(2, np.zeros(3), np.zeros((3, 3)))
    b = Statistics(2, np.full(3, 2.0), np.eye(3))
    assert frechet_distance(a, b) == 12 + 3
    assert frechet_distance(a, a) == 0


def test_fewer_images_lie_farther():
    whole = statistics_of(features(20000, seed=1))
    distances = [
        np.mean([frechet_distance(statistics_of(features(count, seed=s)), whole)
                 for s in range(10, 20)])
        for count in (20, 200, 2000)
    ]
    # As 1 / count.
    assert 7 < distances[0] / distances[1] < 14 and 7 < distances[1] / distances[2] < 14


def test_refused():
    with pytest.raises(ValueError, match='5 and 6 dimensions; compute both with the same network'):
        frechet_distance(statistics_of(features(9, 5)), statistics_of(features(9, 6)))
    with pytest.raises(ValueError, match=r'shape \[2, 7\] cannot be added to sums of 6 dimensions'):
        Sums(6).add(np.zeros((2, 7)))
    with pytest.raises(ValueError, match='features 0 to 1 are not all finite'):
        Sums(6).add(np.full((2, 6), np.nan))
    sums = Sums(6)
    sums.add(np.zeros((1, 6)))
    with pytest.raises(ValueError, match=r'1 image\(s\) are too few for a covariance'):
        sums.statistics({})
    with pytest.raises(ValueError, match=r'mean has shape \[3\] and the covariance \[2, 2\]'):
        Statistics(2, np.zeros(3), np.zeros((2, 2)))
    with pytest.raises(ValueError, match='the covariance has numbers that are not finite'):
        Statistics(2, np.zeros(2), np.full((2, 2), np.inf))
