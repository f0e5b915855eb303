"""Makes the report of --mode=report: computes all that its page shows, writes WORKDIR/report.html.

Like a score, `prepare` checks what a user can get wrong and returns the work.
"""

import dataclasses
import datetime
import logging
import shlex
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from tarflow_jax import files, paths, scoring
from tarflow_jax.data import kinds
from tarflow_jax.evaluation.report import grids, kept, samples, statistics
from tarflow_jax.evaluation.scores import Subject
from tarflow_jax.evaluation.versions import versions
from tarflow_jax.flow.flow import architecture
from tarflow_jax.training import metrics, pictures
from tarflow_jax.training.over_set import evenly_spaced, images_of

NEIGHBOURS = 3  # training images beside a sample
STEPS = 8  # pictures from one sample to another
EXTREMES = 12  # most likely test images, and as many of the least likely
REAL_IMAGES = 100  # test images whose nearest neighbours show what distance is usual
BLOCK_IMAGES = 64

log = logging.getLogger(__name__)


def prepare(subject: Subject, train) -> Callable:
    """Returns the work, a function of (variables, origin), for a checked plan and training set.

    Raises:
      ValueError: with several processes: none of them could read what all of them draw.
    """
    if jax.process_count() > 1:
        raise ValueError('--mode=report is for one process; start it alone.')
    # Imported here: the chart library takes time to load, and only this needs it.
    from tarflow_jax.evaluation.report import page

    def work(variables, origin: dict) -> None:
        start = time.perf_counter()
        log.info('sampling and scoring for the report')
        found = _collect(subject, train, variables, origin)
        path = subject.workdir / 'report.html'
        text = page.page(found)
        kept.write(subject.workdir, found)
        files.write_text(path, text)
        log.info('the report took %.1f s and is in %s (%.1f MB)', time.perf_counter() - start, path,
                 len(text.encode()) / 1e6)

    return work


def _collect(s: Subject, train, variables, origin) -> dict:
    """Returns all that the page shows; see `evaluation.report.page`."""
    r, plan, key = s.config.report, s.plan, jax.random.key(s.config.seed)
    keys = dict(zip(('noise', 'likelihoods', 'blocks'), jax.random.split(key, 3)))
    drawer = samples.Drawer(
        plan, variables, s.mesh, min(s.config.sample.batch_size, r.rows * r.columns)
    )
    drawn = samples.draw(
        drawer, keys['noise'], rows=r.rows, columns=r.columns,
        weights=r.guidance_weights, steps=STEPS
    )
    few = evenly_spaced(s.test, r.test_images)
    count = min(BLOCK_IMAGES, len(few))
    devices = s.mesh.devices.ravel()
    return {
        'title': f'Report of {paths.absolute(s.workdir).name}',
        'origin': origin,
        'model': architecture(plan.model),
        'class_names': plan.conditions.class_names,
        'guidance': dataclasses.asdict(plan.guidance),
        'denoises': plan.denoising is not None,
        'positions': plan.model.token_shape[0],
        'noise_std': plan.recipe.gaussian_noise_std,
        'lowest_noise_std': plan.recipe.scored_noise_std or plan.recipe.gaussian_noise_std,
        'parameters': sum(x.size for x in jax.tree.leaves(variables['params'])),
        'data': {
            name: source.about | {'images': len(source)}
            for name, source in (('train', train), ('test', s.test))
        },
        'caution': kinds.mismatch(s.config.data.expects, train.about.get('kind')),
        'metrics': metrics.read(s.workdir),
        'evaluation': scoring.read(s.workdir),
        'samples': drawn,
        'grids': grids.read(s.workdir, plan.model.image_shape, _column_names(plan)),
        'neighbours': _neighbours(
            drawn, evenly_spaced(train, r.training_images), few, s.config.data.flip
        ),
        'likelihoods': _likelihoods(
            s, variables, evenly_spaced(train, len(few)), few, keys['likelihoods']
        ),
        'blocks': statistics.blocks(
            plan, variables, few, key=keys['blocks'], mesh=s.mesh, count=count
        ),
        'block_images': count,
        'config': s.config.to_dict(),
        'versions': versions(),
        'devices': f'{len(devices)} x {devices[0].device_kind}',
        'command': ' \\\n  '.join(
            ['python -m tarflow_jax.main', *map(shlex.quote, sys.argv[1:])]
        ),
        'date': datetime.datetime.now(datetime.UTC).strftime('%Y-%m-%d %H:%M UTC'),
    }


def _column_names(plan) -> list[str] | None:
    """The class of each column of the image grids of training; None if a column has several."""
    labels = plan.conditions.labels(range(2 * grids.COLUMNS))
    if labels is None or (labels[: grids.COLUMNS] != labels[grids.COLUMNS :]).any():
        return None
    return [plan.conditions.name(label) for label in labels[: grids.COLUMNS]]


def _neighbours(drawn: dict, train, test, mirrored: bool) -> dict:
    """Finds the training images nearest to the first sample of each row, where that is finite."""
    first = drawn.get('denoised', drawn['raw'])[:, 0]
    rows = np.flatnonzero(np.isfinite(first).all((1, 2, 3)))
    own = pictures.to_pixels(first[rows])
    few = evenly_spaced(test, REAL_IMAGES)
    real = images_of(few, range(len(few)))
    indices, distances = statistics.nearest(
        np.concatenate([own, real]), train, min(NEIGHBOURS, len(train)), mirrored
    )
    return {
        'samples': own,
        'rows': rows,
        'images': images_of(train, indices[: len(own)]),
        'distances': distances[: len(own)],
        'real': distances[len(own) :, 0],
        'searched': len(train),
        'mirrored': mirrored,
    }


def _likelihoods(s: Subject, variables, train, test, key) -> dict:
    """Scores as many training images as test images, and picks the extremes of the latter."""

    def bits_of(source):
        return statistics.likelihoods(
            s.plan.model, variables, source, key=key, mesh=s.mesh,
            batch_size=s.config.evaluate.batch_size,
            noise_std=s.plan.recipe.scored_noise_std,
        )

    bits = bits_of(test)
    most, least = statistics.extremes(bits, EXTREMES)
    return {
        'bits': bits,
        'train_bits': bits_of(train),
        'most': (images_of(test, most), bits[most]),
        'least': (images_of(test, least), bits[least]),
    }
