"""Compares ways of denoising samples: `python benchmarks/denoising.py --workdir=DIR[,DIR]`.

It samples from the newest checkpoint of each run and scores the samples: Frechet distance on
EfficientNet-Lite0 (not FID) to the training set, precision and recall. All runs are of one dataset.
It prints one line of JSON for an equal number of test images (or all, if there are fewer), as the
floor for real images, and one for each combination of `--guidances` (RULE:WEIGHT), `--levels`
(noise levels at which an iTARFlow samples; empty for the highest of its training) and `--steps` of
denoising. A TarFlow has one level and one step.

All samples start from the same noise and cycle through the classes, or have the classes of random
training images with `--shares=train`. The lines also have the milliseconds per image of sampling
and denoising. `--out=DIR` gets a grid of the first samples of each line, and of training images. If
the test set has fewer images than `--samples`, a second Frechet distance compares as many samples
with the training set, because the distance depends on the number of images.
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path

import automatic
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax.evaluation import features, networks
from tarflow_jax.evaluation.frechet import Sums, frechet_distance
from tarflow_jax.evaluation.precision_recall import precision_recall
from tarflow_jax.flow.condition import at_noise_level, per_example
from tarflow_jax.sampling.generate import Denoising, denoised
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.over_set import evenly_spaced, images_of

BATCH = 100
SHOWN, COLUMNS = 48, 12  # samples in a grid


class Judge:
    """Scores sets of images against a training set."""

    def __init__(self, train, mesh):
        self.of = functools.partial(
            features.statistics_and_features, networks.load('auto', ''), mesh=mesh,
            batch_size=BATCH, about={},
        )
        # Recall depends on the number of images, so use the same number for all samples.
        self.reference, self.real = self.of(train, keep=len(train), what='training set')

    def __call__(self, source, few: int = 0) -> dict[str, float]:
        """Returns the scores; with `few`, also the distance of that many images of the source."""
        statistics, found = self.of(source, keep=len(source), what='samples')
        count = min(len(found), len(self.real))
        some = np.random.default_rng(0).choice(len(self.real), count, replace=False)
        scores = precision_recall(self.real[some], found)
        distance = frechet_distance(statistics, self.reference)
        row = {'frechet': distance, 'precision': scores['precision'], 'recall': scores['recall']}
        if few:
            sums = Sums(found.shape[1])
            sums.add(found[:few])
            row[f'frechet_of_{few}'] = frechet_distance(sums.statistics({}), self.reference)
        return {name: float(f'{value:.4g}') for name, value in row.items()}


class Flow:
    """The flow of a run, with each core as a device.

    Args:
      labels: int32 [samples], the classes of the samples; None cycles through all classes.
    """

    def __init__(self, plan, variables, mesh, labels):
        self.plan, self.model, self.labels = plan, plan.model, labels
        self.variables = jax.device_put(variables, sharding.replicated(mesh))
        self.split = sharding.batch_sharding(mesh)

    def draw(self, count: int, guidance, level: float | None) -> tuple[list, float]:
        """Returns samples before denoising, in batches with their conditions, and the seconds."""
        found, seconds = [], 0.0
        for start in range(0, count, BATCH):
            numbers = np.arange(start, start + BATCH)
            labels = None if self.labels is None else self.labels[numbers]
            condition = self.plan.conditions.of(numbers, labels)
            if level is not None:
                condition = at_noise_level(condition, np.float32(level))
            noise = jax.random.normal(jax.random.key(start), (BATCH, *self.model.token_shape))
            both = noise, per_example(condition, BATCH)
            noise, condition = jax.device_put(both, self.split)
            begin = time.perf_counter()
            raw = tfj.sample(self.model, self.variables, noise, condition, guidance=guidance)
            found.append((jax.block_until_ready(raw), condition))
            seconds += (time.perf_counter() - begin) * (start > 0)  # the first one compiles
        return found, seconds

    def denoise(self, drawn: list, denoising: Denoising) -> tuple[np.ndarray, float]:
        found, seconds = [], 0.0
        for i, (raw, condition) in enumerate(drawn):
            begin = time.perf_counter()
            images = denoised(self.model, self.variables, raw, condition, denoising)
            found.append(np.asarray(images))
            seconds += (time.perf_counter() - begin) * (i > 0)
        return np.concatenate(found), seconds


def show(folder: str | None, name: str, pixels: np.ndarray):
    """Writes a grid of images, uint8 [n, H, W, C]."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        pictures.save_png(Path(folder, f'{name}.png'), pictures.grid(pixels, COLUMNS))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--workdir', required=True, help='runs, with a comma between them')
    parser.add_argument('--samples', type=int, default=2000)
    parser.add_argument('--guidances', default='linear:1')
    parser.add_argument('--levels', default='', help='noise levels to sample at')
    parser.add_argument('--steps', default='1,5,10,30')
    parser.add_argument('--shares', choices=('equal', 'train'), default='equal', help='of classes')
    parser.add_argument('--out', help='folder for image grids')
    args = parser.parse_args()
    if args.samples % BATCH:
        parser.error(f'--samples {args.samples} must be a multiple of {BATCH}.')
    sharding.use_cores_as_devices(BATCH)
    mesh = sharding.make_mesh()
    workdirs = args.workdir.split(',')
    sets = automatic.newest(workdirs[0])[2]
    judge = Judge(sets['train'], mesh)
    order = np.resize(np.random.default_rng(0).permutation(len(sets['train'])), args.samples)
    show(args.out, 'train', images_of(sets['train'], order[:SHOWN]))
    test = evenly_spaced(sets['test'], args.samples)
    print(json.dumps({'samples': len(test), 'real': True} | judge(test)), flush=True)
    for workdir in workdirs:
        plan, variables, _ = automatic.newest(workdir)
        labels = None
        if args.shares == 'train' and plan.model.num_classes:
            labels = np.array([sets['train'][int(i)]['label'] for i in order], np.int32)
        name = Path(workdir).name
        for about, images in samples(Flow(plan, variables, mesh, labels), args):
            found = automatic.Images(images)
            few = len(test) if len(test) < args.samples else 0
            row = {'run': name, 'samples': args.samples} | about | judge(found, few)
            print(json.dumps(row), flush=True)
            rule = row['guidance'].replace(':', '_')
            show(args.out, f'{name}_{rule}_{row["level"]}_{row["steps"]}', found.pixels[:SHOWN])


def samples(flow, args):
    """Yields (what was done, denoised samples) for each guidance, level and number of steps."""
    levels, steps, lowest, recipe = (None,), (1,), None, flow.plan.recipe
    if flow.model.noise_conditioned:
        levels = [float(x) for x in args.levels.split(',') if x] or (recipe.noise_std,)
        steps, lowest = [int(x) for x in args.steps.split(',')], recipe.lowest_noise_std
    for given, level in itertools.product(args.guidances.split(','), levels):
        rule, weight = given.split(':')
        drawn, drawing = flow.draw(args.samples, tfj.Guidance(float(weight), rule=rule), level)
        for count in steps:
            denoising = Denoising(recipe.noise_std)
            if level is not None:
                denoising = Denoising(levels=tuple(np.linspace(level, lowest, count).tolist()))
            images, seconds = flow.denoise(drawn, denoising)
            each = 1000 / (args.samples - BATCH)
            yield {
                'guidance': given, 'level': level, 'steps': count,
                'drawing_ms': round(drawing * each, 3), 'denoising_ms': round(seconds * each, 3),
            }, images


if __name__ == '__main__':
    main()
