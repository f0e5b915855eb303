"""Times `sample(method='auto')` beside 'sequential' and 'jacobi': `python benchmarks/automatic.py --workdir=DIR`.

It uses the newest checkpoint of a workdir, with several batch sizes, with and without guidance. All
methods start from the same noise and run alternately. It prints one line of JSON per case: the
schedule from `calibrate`; and for each method the seconds, sequential network calls, iterations per
block (block 0 first; of the slowest image), and the largest difference from sequential samples in
the [-1, 1] range. Ratios are relative to sequential. With `--frechet=N` it also prints the Frechet
distance (EfficientNet-Lite0, not FID) of N samples of each method to N training images, and its
change with other noise.

`--width=W` uses an untrained flow of that width instead of a workdir. Its times show the speed of
the machine when it waits for weights; its iterations do not predict those of trained flows.
"""

import argparse
import functools
import json
import statistics

import comparison
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax import config as configs
from tarflow_jax.evaluation import features, networks
from tarflow_jax.evaluation.frechet import frechet_distance
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.over_set import evenly_spaced

METHODS = ('sequential', 'auto', 'jacobi')


class Images:
    """Sampled images as a source."""

    def __init__(self, images: np.ndarray):
        self.pixels = pictures.to_pixels(images)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return {'image': self.pixels[i], 'label': 0}


def newest(workdir: str):
    """Loads the plan, averaged variables and images {'train': ..., 'test': ...} of a workdir."""
    config = tfj.load_config(workdir)
    plan = configs.plan(config)
    _, variables = tfj.load(workdir)
    sets = {split: configs.source(config, split, plan.model) for split in ('train', 'test')}
    return plan, variables, sets


def untrained(width: int):
    model = tfj.TarFlow(
        image_size=32, image_channels=3, patch_size=2, width=width, layers_per_block=(2,) * 4,
        num_classes=10, unroll=2,
    )
    return model, comparison.random_variables(model), None


class Case:
    """One batch size and guidance."""

    def __init__(self, model, variables, batch_size: int, weight: float, tolerance: float):
        devices = max(n for n in range(1, jax.device_count() + 1) if batch_size % n == 0)
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        self.model, self.split = model, sharding.batch_sharding(mesh)
        self.variables = jax.device_put(variables, sharding.replicated(mesh))
        self.labels = None
        if model.num_classes:
            labels = np.arange(batch_size, dtype=np.int32) % model.num_classes
            self.labels = jax.device_put(labels, self.split)
        if weight and self.labels is None:  # without classes, guide by temperature
            self.guidance = tfj.Guidance(weight, temperature=0.9)
        else:
            self.guidance = tfj.Guidance(weight)
        self.batch_size, self.tolerance = batch_size, tolerance
        self.schedule = tfj.calibrate(
            model, self.variables, self.labels, batch_size=batch_size, guidance=self.guidance,
            tolerance=tolerance,
        )

    def draw(self, method: str, seed: int, **options):
        shape = (self.batch_size, *self.model.token_shape)
        noise = jax.random.normal(jax.random.key(1000 + seed), shape)
        how = {'schedule': self.schedule} if method == 'auto' else {'tolerance': self.tolerance}
        return jax.block_until_ready(tfj.sample(
            self.model, self.variables, jax.device_put(noise, self.split), self.labels,
            guidance=self.guidance, method=method, **how, **options,
        ))

    def compared(self, repeats: int) -> dict:
        draws = {m: [] for m in METHODS}

        def drawn(method):
            draws[method].append(np.asarray(self.draw(method, seed=len(draws[method]))))

        seconds = comparison.in_turn({m: functools.partial(drawn, m) for m in METHODS}, repeats)
        rows = {}
        for method in METHODS:
            images, info = self.draw(method, 0, return_info=True)
            iterations = np.asarray(info.iterations).max(1)
            differences = [abs(a - b) for a, b in zip(draws[method], draws['sequential'])]
            rows[method] = {
                'seconds': round(statistics.median(seconds[method]), 4),
                'ratio': comparison.ratio(seconds[method], seconds['sequential']),
                'calls_in_a_row': int(iterations.sum()),
                'iterations': iterations.tolist(),
                'largest_difference': float(f'{max(d.max() for d in differences):.2g}'),
                'largest_round_trip_error': float(f'{np.max(info.round_trip):.2g}'),
                'images_drawn_sequentially': int(np.sum(info.sequential)),
            }
        return rows

    def frechet(self, count: int, source) -> dict:
        network = networks.load('auto', '')
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        statistics_of = functools.partial(
            features.statistics_of, network, what='images', mesh=mesh, batch_size=64, about={}
        )
        reference = statistics_of(evenly_spaced(source, count))
        batches = -(-count // self.batch_size)
        found = {}
        for name, method, first in [(m, m, 0) for m in METHODS] + [('other noise', 'sequential', 10**4)]:
            images = [np.asarray(self.draw(method, first + i)) for i in range(batches)]
            own = statistics_of(Images(np.concatenate(images)[:count]))
            found[name] = round(frechet_distance(own, reference), 3)
        return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', help='a run of the command line')
    parser.add_argument('--width', type=int, help='an untrained flow of this width instead')
    parser.add_argument('--batches', default='1,8,64')
    parser.add_argument('--guidances', default='0,2')
    parser.add_argument('--tolerance', type=float, default=1e-4)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--frechet', type=int, default=0, help='images, of the largest batch')
    args = parser.parse_args()
    sharding.use_cores_as_devices(64)
    if args.width:
        model, variables, source = untrained(args.width)
    else:
        plan, variables, sets = newest(args.workdir)
        model, source = plan.model, sets['train']
    batches = [int(b) for b in args.batches.split(',')]
    for weight in map(float, args.guidances.split(',')):
        for batch_size in batches:
            case = Case(model, variables, batch_size, weight, args.tolerance)
            row = {
                'T': model.num_patches, 'width': model.width, 'batch': batch_size,
                'guidance': weight, 'tolerance': args.tolerance,
                'schedule': [block.method for block in case.schedule.blocks],
                **case.compared(args.repeats),
            }
            if args.frechet and source and batch_size == max(batches):
                row['frechet'] = case.frechet(args.frechet, source)
            print(json.dumps(row | comparison.versions(with_official=False)), flush=True)


if __name__ == '__main__':
    main()
