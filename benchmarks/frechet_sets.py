"""Computes Frechet distances of datasets of known order: `python benchmarks/frechet_sets.py`.

It compares the embedded test images of Fashion-MNIST (unchanged, blurred, and with noise) with the
training images: distance, precision and recall. Without `--weights` it uses EfficientNet-Lite0, so
the distance is not FID. It prints one line of JSON per dataset.
"""

import argparse
import dataclasses
import json

import numpy as np

from tarflow_jax.data import sources
from tarflow_jax.evaluation import features, networks
from tarflow_jax.evaluation.frechet import frechet_distance
from tarflow_jax.evaluation.outliers import corrupted
from tarflow_jax.evaluation.precision_recall import precision_recall
from tarflow_jax.training import sharding
from tarflow_jax.training.over_set import evenly_spaced

NOISE = 25  # standard deviation in grey levels


@dataclasses.dataclass(frozen=True)
class Noisy:
    """A source with Gaussian noise on its images."""

    source: object

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        element = self.source[i]
        noise = np.random.default_rng(int(i)).normal(0, NOISE, element['image'].shape)
        noisy = np.clip(np.round(element['image'] + noise), 0, 255).astype(np.uint8)
        return {**element, 'image': noisy}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--weights', default='', help='pt_inception-2015-12-05-6726825d.pth')
    parser.add_argument('--train', type=int, default=10_000, help='training images')
    parser.add_argument('--test', type=int, default=2_000, help='test images')
    given = parser.parse_args()
    sharding.use_cores_as_devices(100)
    network = networks.load('auto', given.weights)
    train = evenly_spaced(sources.embedded('train'), given.train)
    test = evenly_spaced(sources.embedded('test'), given.test)

    options = dict(mesh=sharding.make_mesh(), batch_size=100, about={}, keep=len(test))
    reference, real = features.statistics_and_features(network, train, what='train', **options)
    for name, source in {
        'test': test, 'test, blurred': corrupted(test, 'blurred'), 'test, noisy': Noisy(test)
    }.items():
        found, generated = features.statistics_and_features(network, source, what=name, **options)
        row = {
            'set': name,
            'network': network.name,
            'images': [found.count, reference.count],
            'frechet_distance': frechet_distance(found, reference),
            **precision_recall(real, generated),
        }
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == '__main__':
    main()
