"""What --mode=report does: computes all that its page shows, and writes WORKDIR/report.html.

As the scores, it checks what a user can get wrong and returns the work.
"""

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
from tarflow_jax.evaluation.report import drawn, measured
from tarflow_jax.evaluation.scores import Subject
from tarflow_jax.evaluation.versions import versions
from tarflow_jax.flow.flow import architecture
from tarflow_jax.training import metrics, pictures
from tarflow_jax.training.over_set import evenly_spaced, images_of

NEIGHBOURS = 3  # training images beside a sample
STEPS = 8  # pictures from one sample to another
EXTREMES = 12  # test images of each kind
REAL_IMAGES = 100  # test images whose neighbours say what distance is usual
BLOCK_IMAGES = 64

log = logging.getLogger(__name__)


def prepare(subject: Subject, train) -> Callable:
    """The work, a function of (variables, origin), for a checked plan and its training set.

    Raises:
      ValueError: with several processes, of which none could read what all of them draw.
    """
    if jax.process_count() > 1:
        raise ValueError('--mode=report is for one process; start it alone.')
    # Imported here: the chart library takes time to load, and only this needs it.
    from tarflow_jax.evaluation.report import page

    def work(variables, origin: dict) -> None:
        start = time.perf_counter()
        found = _collect(subject, train, variables, origin)
        path = subject.workdir / 'report.html'
        text = page.page(found)
        files.write_text(path, text)
        log.info('the report took %.1f s and is in %s (%.1f MB)', time.perf_counter() - start, path,
                 len(text.encode()) / 1e6)

    return work


def _collect(s: Subject, train, variables, origin) -> dict:
    """All that the page shows; see `evaluation.report.page`."""
    r, plan, key = s.config.report, s.plan, jax.random.key(s.config.seed)
    keys = dict(zip(('noise', 'likelihoods', 'blocks'), jax.random.split(key, 3)))
    drawer = drawn.Drawer(
        plan, variables, s.mesh, min(s.config.sample.batch_size, r.rows * r.columns)
    )
    samples = drawn.draw(
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
        'drawn': samples,
        'neighbours': _neighbours(
            samples, evenly_spaced(train, r.training_images), few, s.config.data.flip
        ),
        'likelihoods': _likelihoods(s, variables, few, keys['likelihoods']),
        'blocks': measured.blocks(
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


def _neighbours(samples: dict, train, test, mirrored: bool) -> dict:
    """The training images nearest to the first sample of each row, where that is finite."""
    first = samples.get('denoised', samples['raw'])[:, 0]
    rows = np.flatnonzero(np.isfinite(first).all((1, 2, 3)))
    own = pictures.to_pixels(first[rows])
    few = evenly_spaced(test, REAL_IMAGES)
    real = images_of(few, range(len(few)))
    indices, distances = measured.nearest(
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


def _likelihoods(s: Subject, variables, test, key) -> dict:
    bits = measured.likelihoods(
        s.plan.model, variables, test, key=key, mesh=s.mesh,
        batch_size=s.config.evaluate.batch_size,
        noise_std=s.plan.recipe.scored_noise_std,
    )
    most, least = measured.extremes(bits, EXTREMES)
    return {
        'bits': bits,
        'most': (images_of(test, most), bits[most]),
        'least': (images_of(test, least), bits[least]),
    }
