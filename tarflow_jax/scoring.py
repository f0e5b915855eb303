"""What --mode=evaluate does: metrics by name, one table, and a file with all it takes to repeat it.

Each metric is a function of a `Subject` that checks everything a user can get wrong and returns
the work as a closure, as the modes in `commands.py` do.
"""

import dataclasses
import itertools
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tarflow_jax import config as configs
from tarflow_jax import files
from tarflow_jax.data import sources
from tarflow_jax.evaluation import (
    features,
    networks,
    outliers,
    sample_files,
    statistics_files,
    tables,
)
from tarflow_jax.evaluation.bits_per_dim import bits_per_dim
from tarflow_jax.evaluation.classification import classification
from tarflow_jax.evaluation.frechet import Statistics, frechet_distance
from tarflow_jax.evaluation.over_set import EvenlySpaced, batches
from tarflow_jax.evaluation.precision_recall import precision_recall
from tarflow_jax.evaluation.round_trip import round_trip
from tarflow_jax.evaluation.versions import versions
from tarflow_jax.training.step import add_noise

# How the references of the Frechet distance are called in what is published.
CONVENTIONS = {
    'train_flipped': 'training set, half of it mirrored (official TarFlow code)',
    'train': 'training set (EDM; ADM where the whole set is its reference)',
}
FORMATS = {
    'adm': 'file of the ADM suite',
    'edm': 'file of the EDM suite',
    'torchmetrics': 'file of torchmetrics',
    'tarflow_jax': 'file of tarflow_jax',
}
FILE = 'evaluation.json'
NEIGHBOURS = 5  # of density and coverage; precision and recall take 3

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated, but for the variables."""

    config: object  # a ConfigDict
    plan: configs.Plan
    mesh: jax.sharding.Mesh
    workdir: Path
    test: object  # a source, see data.sources

    def options(self) -> dict:
        """What the scores of a whole set take."""
        e = self.config.evaluate
        key = jax.random.key(self.config.seed)
        return dict(mesh=self.mesh, batch_size=e.batch_size, key=key)

    def train(self):
        return configs.source(self.config, 'train', self.plan.model)


def prepare(subject: Subject) -> Callable:
    """Checks what config.evaluate.metrics need, and returns the work: see `work` inside."""
    jobs = {name: METRICS[name](subject) for name in subject.config.evaluate.metrics}

    def work(variables, origin: dict, draw_samples: Callable) -> dict:
        """Prints the scores and writes evaluation.json, whose content it returns.

        Args:
          origin: where the variables come from, as JSON values, with a 'name'.
          draw_samples: of nothing, gives the config's samples as (source, summary).
        """
        scores = {}
        for name, job in jobs.items():
            start = time.perf_counter()
            scores[name] = job(variables, draw_samples)
            log.info('%s took %.1f s', name, time.perf_counter() - start)
        report = {'checkpoint': origin} | about(subject) | {'scores': scores}
        if jax.process_index() == 0:
            print(*tables.table(report), sep='\n', flush=True)
            write(subject.workdir, report)
        return report

    return work


def about(subject: Subject) -> dict:
    """All it takes to repeat an evaluation beside the checkpoint, as JSON values."""
    devices = subject.mesh.devices.ravel()
    return {
        'data': {'images': len(subject.test)} | subject.test.about,
        'seed': subject.config.seed,
        'config': subject.config.to_dict(),
        'versions': versions(),
        'devices': {
            'kind': devices[0].device_kind,
            'mesh': dict(subject.mesh.shape),
            'processes': jax.process_count(),
        },
    }


def write(workdir: Path, report: dict) -> None:
    """Writes evaluation.json; one that is there of other numbers keeps its own name."""
    path = workdir / FILE
    text = json.dumps(report, indent=2, default=_plain) + '\n'
    if path.exists() and (before := path.read_text()) != text:
        # A copy: if anything fails here, evaluation.json is still there.
        names = (workdir / f'evaluation.{k}.json' for k in itertools.count())
        files.write_text(next(name for name in names if not name.exists()), before)
    files.write_text(path, text)
    log.info('scores are in %s', path)


def read(workdir) -> dict | None:
    """What evaluation.json holds; None if it is missing or is not what evaluation writes."""
    try:
        found = json.loads((Path(workdir) / FILE).read_text())
        return found if {'checkpoint', 'scores', 'data'} <= found.keys() else None
    except (FileNotFoundError, ValueError, AttributeError):
        return None


def _plain(value):
    """numpy's numbers as JSON has them."""
    return value.item() if isinstance(value, np.generic) else str(value)


def _bits_per_dim(s: Subject) -> Callable:
    return lambda variables, _: bits_per_dim(
        s.plan.model, variables, s.test, recipe=s.plan.recipe, draws=s.config.evaluate.draws,
        **s.options(),
    )


def _classification(s: Subject) -> Callable:
    return lambda variables, _: classification(
        s.plan.model, variables, s.test, recipe=s.plan.recipe, draws=s.config.evaluate.draws,
        **s.options(),
    )


def _outliers(s: Subject) -> Callable:
    o, model = s.config.evaluate.outliers, s.plan.model
    sets = {'training set': s.train(), 'test set': s.test}
    if o.source:
        other = sources.load(o.source, o.split, path=o.path, name=o.name)
        sources.check(
            other, image_size=model.image_size, channels=model.image_channels, num_classes=0,
            what=f'the set of evaluate.outliers.source {o.source!r}',
        )
        sets[other.about.get('dataset', o.source)] = other
    sets = {name: EvenlySpaced(source, o.images) for name, source in sets.items()}

    def work(variables, _) -> dict:
        found = outliers.outliers(model, variables, sets, seed=s.config.seed, **s.options())
        if jax.process_index() == 0:
            s.workdir.mkdir(parents=True, exist_ok=True)
            outliers.histogram_picture(found, s.workdir / 'outliers.png')
        return found

    return work


def _round_trip(s: Subject) -> Callable:
    few = EvenlySpaced(s.test, s.config.evaluate.round_trip_images)

    def work(variables, _) -> dict:
        image_key, latent_key = jax.random.split(jax.random.key(s.config.seed))
        _, batch, _ = next(batches(few, mesh=s.mesh, batch_size=len(few), what='round trip'))
        images = jax.jit(add_noise, static_argnums=2)(image_key, batch['image'], s.plan.recipe)
        return round_trip(
            s.plan.model, variables, images, batch['label'], key=latent_key, mesh=s.mesh,
            guidance=s.plan.guidance,
        )

    return work


def _frechet(s: Subject) -> Callable:
    f = s.config.evaluate.frechet
    network = networks.load(f.network, f.weights)
    train = s.train()
    given = {name: statistics_files.read(name) for name in f.references if name not in CONVENTIONS}
    for name, reference in given.items():
        if reference.mean.size != network.about['feature_size']:
            raise ValueError(
                f'{name} of evaluate.frechet.references holds statistics of {reference.mean.size} '
                f'features, and {network.name} has {network.about["feature_size"]}; choose the '
                'evaluate.frechet.network that they were made with.'
            )
    ready = sample_files.open_samples(f.samples) if f.samples else None
    count = s.config.sample.count if ready is None else len(ready)
    keep = min(f.neighbours, count, len(train))
    if keep <= NEIGHBOURS:
        raise ValueError(
            f'evaluate.frechet.neighbours {f.neighbours}, {count} samples and {len(train)} '
            f'training images leave {keep} of each to look for {NEIGHBOURS} neighbours among; take '
            'more.'
        )
    folder = Path(f.statistics) if f.statistics else s.workdir / 'statistics'
    options = dict(mesh=s.mesh, batch_size=f.batch_size)

    def work(_, draw_samples) -> dict:
        samples, drawn = draw_samples() if ready is None else (ready, {'path': f.samples})
        generated, near = features.statistics_and_features(
            network, samples, keep=keep, about={}, what='samples', **options
        )
        floor = features.statistics_of(
            network, EvenlySpaced(s.test, len(samples)), about={}, what='test set', **options
        )
        rows = []
        for name in f.references:
            reference = given.get(name) or features.cached_statistics(
                folder, network, train, flip=name == 'train_flipped', seed=s.config.seed,
                what=name, **options,
            )
            rows.append(_distances(name, generated, floor, reference))
        real = np.concatenate([
            found['pooled'] for found in features.features_of(
                network, EvenlySpaced(train, keep), what='training set', **options
            )
        ])
        return {
            'network': network.about,
            'is_fid': network.is_fid,
            'samples': len(samples),
            'samples_from': str(drawn['path']),
            'pixels': 'rounded to the nearest of 256 levels',
            'distances': rows,
            'neighbours': {'images_of_each': keep} | precision_recall(real, near),
        }

    return work


def _distances(name: str, generated: Statistics, floor: Statistics, reference: Statistics) -> dict:
    kind = CONVENTIONS.get(name) or FORMATS[reference.about['format']]
    row = {
        'reference': name,
        'convention': kind,
        'reference_images': reference.count,
        'reference_about': reference.about,
        'distance': frechet_distance(generated, reference),
        'real_floor': frechet_distance(floor, reference),
        'real_floor_images': floor.count,
    }
    if reference.spatial is not None and generated.spatial is not None:
        row['spatial_distance'] = frechet_distance(generated.spatial, reference.spatial)
    return row


METRICS = {
    'bits_per_dim': _bits_per_dim,
    'classification': _classification,
    'outliers': _outliers,
    'round_trip': _round_trip,
    'frechet': _frechet,
}
