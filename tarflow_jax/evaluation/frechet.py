"""The Frechet distance between two sets of features, and the statistics that it needs."""

import functools
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Statistics:
    """What the Frechet distance knows of a set of images.

    Args:
      count: of the images; None where a file does not say.
      mean: float64 [D].
      covariance: float64 [D, D], the sum over the images divided by count - 1.
      about: where the numbers come from: data set, flips, network, 'format' of the file.
      spatial: of the features before the pooling, for sFID (Nash et al. 2021, arXiv 2103.03841).
    Raises:
      ValueError: for other shapes, numbers that are not finite, a covariance that is not symmetric
        or has a negative variance, or fewer than two images.
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
                f'the mean has shape {list(shapes[0])} and the covariance {list(shapes[1])}; they '
                'must be [D] and [D, D].'
            )
        for name in ('mean', 'covariance'):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f'the {name} holds numbers that are not finite; compute the statistics again.'
                )
        wrong = None
        if self.count is not None and self.count < 2:
            wrong = f'{self.count} images have no covariance'
        elif self.mean.size and (variance := self.covariance.diagonal().min()) < -self._rounding():
            wrong = f'the covariance has the variance {variance:.3g}, which is negative'
        elif abs(self.covariance - self.covariance.T).max(initial=0) > self._rounding():
            wrong = 'the covariance is not symmetric'
        if wrong:
            raise ValueError(f'{wrong}; compute the statistics again.')

    def _rounding(self) -> float:
        """What may be rounding in an entry of the covariance, of float32 sums at worst."""
        return 1e-3 * abs(self.covariance).max(initial=0)

    @functools.cached_property
    def factor(self) -> np.ndarray:
        """F [D, rank] with F F^T = covariance; found once, as a set is in several distances."""
        values, vectors = np.linalg.eigh(self.covariance)
        kept = values > values[-1] * values.size * np.finfo(np.float64).eps
        return vectors[:, kept] * np.sqrt(values[kept])


class Sums:
    """Count, mean and scatter (the sum of outer products around the mean) of features, in float64.

    Two sets are joined by
      mean = mean_1 + n_2 / n d,  scatter = scatter_1 + scatter_2 + n_1 n_2 / n d d^T,
    with d = mean_2 - mean_1 and n = n_1 + n_2 (Chan, Golub and LeVeque 1979). Nothing cancels, as
    it does in the sum of x x^T less n mean mean^T.
    """

    def __init__(self, dim: int):
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))

    def add(self, features) -> None:
        """Adds the features [B, D] of B images.

        Raises:
          ValueError: for another D, or numbers that are not finite.
        """
        features = np.asarray(features, np.float64)
        if features.ndim != 2 or features.shape[1] != self.mean.size:
            raise ValueError(
                f'features of shape {list(features.shape)} cannot be added to sums of '
                f'{self.mean.size} dimensions; give [B, {self.mean.size}].'
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
        """Mean and covariance so far, that of a sample (divided by count - 1).

        Raises:
          ValueError: from fewer than two images, which have no covariance.
        """
        if self.count < 2:
            raise ValueError(f'{self.count} image(s) have no covariance; give at least 2.')
        covariance = self.scatter / (self.count - 1)
        return Statistics(self.count, self.mean.copy(), covariance, about, spatial)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), in float64.

    The Wasserstein-2 distance, squared, of two normal distributions; with the features of
    Inception-v3 the FID (Heusel et al. 2017, arXiv 1706.08500).

    C_a C_b is not symmetric. From fewer images than dimensions it is singular as well, and then
    its square root, or its eigenvalues, come out with errors of the size of the square root of
    the rounding, complex or NaN. But with any factors C = F F^T, tr (C_a C_b)^(1/2) is the sum
    of the singular values of F_a^T F_b, which are real, not negative and precise to the rounding.
    The factors come from the eigenvectors of each C, less those whose eigenvalue is rounding.

    What to compare with what:
      From few images the distance is too large: by about a quantity / count that depends on both
      sets, 10,000 images against 50,000 by whole units of the FID (Chong and Forsyth 2020, arXiv
      1911.07023). Compare only numbers from equally many images; papers use 50,000.
      The training set's statistics, those of a held-out set, with and without flips differ, and
      so do ways to resize: keep them with the number.
      A set against itself has the distance 0, two halves of one set do not.

    Raises:
      ValueError: if the numbers of dimensions differ.
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
