"""The table of the scores in config.evaluate.metrics.

Preparing a score from a `Subject` checks for all user errors, and returns the work as a closure,
like the modes in `commands.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tarflow_jax import config as configs
from tarflow_jax.data import sources
from tarflow_jax.evaluation import classification, frechet_score, levels, outliers, round_trip
from tarflow_jax.evaluation.bits_per_dim import bits_per_dim
from tarflow_jax.training.corruption import condition_of, corrupt
from tarflow_jax.training.over_set import batches, evenly_spaced

FEW_LEVELS = 5  # number of levels of the score `levels` if the config has none


@dataclasses.dataclass(frozen=True)
class Subject:
    """Everything an evaluation needs except the variables."""

    config: object  # a ConfigDict
    plan: configs.Plan
    mesh: jax.sharding.Mesh
    workdir: Path
    test: object  # a source, see data.sources

    def options(self) -> dict:
        """Returns the arguments that all scores of a whole dataset share."""
        batch_size, key = self.config.evaluate.batch_size, jax.random.key(self.config.seed)
        return dict(mesh=self.mesh, batch_size=batch_size, key=key)

    def train(self):
        return configs.source(self.config, 'train', self.plan.model)


@dataclasses.dataclass(frozen=True)
class Score:
    """One entry of the table.

    Args:
      prepare: takes a `Subject` and returns a function of (variables, draw_samples), which returns
        the result as JSON values. `draw_samples()` returns the config's samples as (source,
        summary).
      rows: converts the result to rows (name, value) of the printed table.
      needs_classes: whether it is for class-conditional flows only.
      needs_levels: whether it is for noise-conditioned flows only.
    """

    prepare: Callable[[Subject], Callable]
    rows: Callable[[dict], list[tuple[str, str]]]
    needs_classes: bool = False
    needs_levels: bool = False


def _of_test_set(score: Callable) -> Callable:
    """Makes the `prepare` of a score over all test images with the noise of the recipe."""

    def prepare(s: Subject) -> Callable:
        return lambda variables, _: score(
            s.plan.model, variables, s.test, recipe=s.plan.recipe, draws=s.config.evaluate.draws,
            **s.options(),
        )

    return prepare


def _classification(s: Subject) -> Callable:
    score = functools.partial(classification.classification, name=s.plan.conditions.name)
    return _of_test_set(score)(s)


def _bits_rows(r: dict) -> list[tuple[str, str]]:
    error = f'standard error {r["standard_error_over_images"]:.4f} over images'
    if r['draws'] > 1:
        error += f', {r["standard_error_over_draws"]:.2g} over draws'
    rows = [
        ('bits/dim', f'{r["bits_per_dim"]:.4f}  ({error}; {r["images"]} images, {r["draws"]} '
         'draws of the dequantization; float32)'),
    ]
    if r['draws'] > 1:
        rows.append((
            f'bits/dim, importance-weighted bound, K = {r["draws"]}',
            f'{r["importance_weighted_bits_per_dim"]:.4f}  (standard error '
            f'{r["importance_weighted_standard_error_over_images"]:.4f} over images; tighter, '
            'not comparable with published numbers)',
        ))
    return [*rows, ('training loss', f'{r["loss"]:.4f} nats per dimension')]


def _outliers(s: Subject) -> Callable:
    o, model = s.config.evaluate.outliers, s.plan.model
    sets = {'training set': s.train(), 'test set': s.test}
    if o.source:
        other = sources.load(o.source, o.split, path=o.path, name=o.name)
        sources.check(
            other, image_size=model.image_size, channels=model.image_channels, num_classes=0,
            what=f'the dataset of evaluate.outliers.source {o.source!r}',
        )
        sets[other.about.get('dataset', o.source)] = other
    sets = {name: evenly_spaced(source, o.images) for name, source in sets.items()}

    def work(variables, _) -> dict:
        found = outliers.outliers(
            model, variables, sets, seed=s.config.seed,
            noise_std=s.plan.recipe.scored_noise_std, **s.options(),
        )
        if jax.process_index() == 0:
            outliers.histogram_picture(found, s.workdir / 'outliers.png')
        return found

    return work


def _levels(s: Subject) -> Callable:
    recipe, chosen = s.plan.recipe, tuple(s.config.evaluate.levels)
    chosen = chosen or np.geomspace(recipe.lowest_noise_std, recipe.noise_std, FEW_LEVELS)
    return lambda variables, _: levels.bits_at_levels(
        s.plan.model, variables, s.test, levels=chosen, draws=s.config.evaluate.draws,
        **s.options(),
    )


def _round_trip(s: Subject) -> Callable:
    few = evenly_spaced(s.test, s.config.evaluate.round_trip_images)

    def work(variables, _) -> dict:
        image_key, latent_key = jax.random.split(jax.random.key(s.config.seed))
        _, batch, _ = next(batches(few, mesh=s.mesh, batch_size=len(few), what='round trip'))
        images, noise_std, _ = jax.jit(corrupt, static_argnums=2)(
            image_key, batch['image'], s.plan.recipe
        )
        return round_trip.round_trip(
            s.plan.model, variables, images, condition_of(s.plan.model, batch, noise_std),
            key=latent_key, guidance=s.plan.guidance,
        )

    return work


SCORES = {
    'bits_per_dim': Score(_of_test_set(bits_per_dim), _bits_rows),
    'classification': Score(
        _classification, classification.rows, needs_classes=True
    ),
    'levels': Score(_levels, levels.rows, needs_levels=True),
    'outliers': Score(_outliers, outliers.rows),
    'round_trip': Score(_round_trip, round_trip.rows),
    'frechet': Score(frechet_score.prepare, frechet_score.rows),
}


def check_names(metrics, model) -> None:
    """Raises ValueError unless all metrics are in the table and suit the flow."""
    for metric in metrics:
        if ',' in metric:
            listed = ','.join(f'"{name.strip()}"' for name in metric.split(','))
            raise ValueError(
                f"evaluate.metrics {metric!r:.100} is one word; write '({listed})', in quotes."
            )
        if metric not in SCORES:
            raise ValueError(f'evaluate.metrics {metric!r} must be one of {", ".join(SCORES)}.')
        if SCORES[metric].needs_classes and model.num_classes < 2:
            raise ValueError(
                f'evaluate.metrics {metric} needs classes, but model.num_classes is '
                f'{model.num_classes}; leave it out.'
            )
        if SCORES[metric].needs_levels and not model.noise_conditioned:
            raise ValueError(
                f'evaluate.metrics {metric} is only for flows with model.noise_conditioned=True; '
                'leave it out.'
            )
