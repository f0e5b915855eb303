"""The Frechet distance between two sets of features, and the statistics for it."""

import functools
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of the features of a set of images.

    Args:
      count: number of images; None if a file does not have it.
      mean: float64 [D].
      covariance: float64 [D, D], the sum over the images divided by count - 1.
      about: origin of the numbers: dataset, flips, network, 'format' of the file.
      spatial: statistics before the pooling, for sFID (Nash et al. 2021, arXiv 2103.03841).
    Raises:
      ValueError: for wrong shapes, non-finite numbers, a covariance that is not symmetric or has a
        negative variance, or fewer than two images.
    """

    count: int | None
    mean: np.ndarray
    covariance: np.ndarray
    about: dict = field(default_factory=dict)
    spatial: 'Statistics | None' = None

    def __post_init__(self):
        shapes = self.mean.shape, self.covariance.shape
        if len(shapes[0]) != 1 or shapes[1] != shapes[0] * 2:
            raise ValueError(
                f'the mean has shape {list(shapes[0])} and the covariance {list(shapes[1])}, but '
                'they must be [D] and [D, D].'
            )
        for name in ('mean', 'covariance'):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f'the {name} has numbers that are not finite; compute the statistics again.'
                )
        wrong = None
        if self.count is not None and self.count < 2:
            wrong = f'{self.count} images are too few for a covariance'
        elif self.mean.size and (variance := self.covariance.diagonal().min()) < -self._rounding():
            wrong = f'the covariance has the negative variance {variance:.3g}'
        elif abs(self.covariance - self.covariance.T).max(initial=0) > self._rounding():
            wrong = 'the covariance is not symmetric'
        if wrong:
            raise ValueError(f'{wrong}; compute the statistics again.')

    def _rounding(self) -> float:
        """Returns the largest rounding error of a covariance entry, for float32 sums at worst."""
        return 1e-3 * abs(self.covariance).max(initial=0)

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """Returns F [D, rank] with F F^T = covariance; cached for use in several distances."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * values.size * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


class Sums:
    """Running count, mean and scatter (sum of outer products around the mean), in float64.

    Two sets are merged by
      mean = mean_1 + n_2 / n d,  scatter = scatter_1 + scatter_2 + n_1 n_2 / n d d^T,
    with d = mean_2 - mean_1 and n = n_1 + n_2 (Chan, Golub and LeVeque 1979). This avoids the
    cancellation in the sum of x x^T minus n mean mean^T.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    def add(self, features) -> None:
        """Adds the features [B, D] of B images.

        Raises:
          ValueError: for a wrong D, or numbers that are not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.mean.size:
            raise ValueError(
                f'features of shape {list(features.shape)} cannot be added to sums of '
                f'{self.mean.size} dimensions; pass [B, {self.mean.size}].'
            )
        if not np.isfinite(features).all():
            raise ValueError(
                f'features {self.count} to {self.count + len(features) - 1} are not all finite; '
                'check the images and the weights of the network.'
            )
        if len(features):
            total, mean = self.count + len(features), features.mean(0)
            between = (mean - self.mean) * np.sqrt(self.count * len(features) / total)
            rows = np.vstack([features - mean, between])
            self.scatter += rows.T @ rows
            self.mean = self.mean + (mean - self.mean) * (len(features) / total)
            self.count = total

    def statistics(self, about: dict, spatial: Statistics | None = None) -> Statistics:
        """Returns the mean and the sample covariance (divided by count - 1) so far.

        Raises:
          ValueError: for fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f'{self.count} image(s) are too few for a covariance; add at least 2.')
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.count, self.mean.copy(), covariance, about, spatial)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Computes |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) in float64.

    This is the squared Wasserstein-2 distance of two normal distributions; with the features of
    Inception-v3 it is the FID (Heusel et al. 2017, arXiv 1706.08500).

    C_a C_b is not symmetric. With fewer images than dimensions it is also singular, and its square
    root or eigenvalues have errors as large as the square root of the rounding error, or are
    complex or NaN. For any factors C = F F^T, tr (C_a C_b)^(1/2) equals the sum of the singular
    values of F_a^T F_b, which are real, not negative and precise up to rounding. The factors come
    from the eigenvectors of each C, without those whose eigenvalue is only rounding.

    Which numbers can be compared:
      With few images the distance is biased upward, by about a constant / count that depends on
      both sets: 10,000 instead of 50,000 images change the FID by whole units (Chong and Forsyth
      2020, arXiv 1911.07023). Compare only numbers with the same count; papers use 50,000.
      Statistics differ between training and held-out sets, with and without flips, and between
      ways to resize. Report them with the number.
      A set has distance 0 to itself; two halves of a set do not have distance 0.

    Raises:
      ValueError: if the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f'the statistics have {a.mean.size} and {b.mean.size} dimensions; compute both with '
            'the same network.'
        )
    shift = a.mean - b.mean
    shared = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False)
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared.sum()
    return max(float(distance), 0.0)
