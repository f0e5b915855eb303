"""Computes the features of a whole source on a mesh, and caches their statistics in files.

A network is any object with `variables`, `features(variables, uint8 [B, H, W, C])`, which returns a
dict with 'pooled' [B, D] and optionally 'spatial' [B, E], and `about`, a JSON dict.
"""

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from tarflow_jax import paths
from tarflow_jax.evaluation import statistics_files
from tarflow_jax.evaluation.frechet import Statistics, Sums
from tarflow_jax.training import sharding
from tarflow_jax.training.over_set import View, batches
from tarflow_jax.training.processes import from_first

log = logging.getLogger(__name__)


def features_of(
    network, source, *, mesh, batch_size: int, flip: bool = False, seed: int = 0,
    what: str = 'features',
) -> Iterator[dict[str, np.ndarray]]:
    """Computes the features of all images of a source, in order, on every process.

    Args:
      source: see `data.sources`.
      flip: whether to mirror half of the images, left to right, as the official code does for the
        statistics of training sets. The choice depends only on the seed and on the index of the
        image in the source.
      what: the label of the progress bar.
    Returns:
      An iterator of {'pooled': float32 [b, D], ...}. All processes must iterate over it.
    """
    if flip:
        mirrored = _stream(seed, 'flips').random(len(source)) < 0.5
        source = View(
            source, range(len(source)),
            lambda i, image: image[:, ::-1] if mirrored[i] else image,
        )
    compute = _compiled(network.features)
    everywhere = sharding.replicated(mesh)
    variables = jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, everywhere, np.asarray(x).__getitem__),
        network.variables,
    )
    for _, batch, mask in batches(source, mesh=mesh, batch_size=batch_size, what=what):
        found = sharding.to_host(compute(variables, batch['image']))
        yield {name: value[mask] for name, value in found.items()}


def statistics_of(network, source, *, about: dict, **options) -> Statistics:
    """Computes statistics of the features of a source; `options` are those of `features_of`."""
    return statistics_and_features(network, source, keep=0, about=about, **options)[0]


def statistics_and_features(
    network, source, *, keep: int, about: dict, seed: int = 0, **options
) -> tuple[Statistics, np.ndarray]:
    """Computes statistics, and pooled features float32 [min(keep, images), D] of a random subset.

    The subset is for precision and recall. It is random, by the seed and in the order of the
    source, because the first images of a dataset are often from a few classes.
    """
    keep = min(keep, len(source))
    chosen = np.zeros(len(source), bool)
    chosen[_stream(seed, 'subset').choice(len(source), keep, replace=False)] = True
    sums, kept, done = {}, [], 0
    for found in features_of(network, source, seed=seed, **options):
        for name in {'pooled', 'spatial'} & set(found):
            if name not in sums:
                sums[name] = Sums(found[name].shape[1])
            sums[name].add(found[name])
        pooled = found['pooled']
        kept.append(pooled[chosen[done : done + len(pooled)]].astype(np.float32))
        done += len(pooled)
    if done < 2:
        raise ValueError(f'{done} image(s) are too few for statistics; use a dataset of 2 or more.')
    spatial = sums['spatial'].statistics({}) if 'spatial' in sums else None
    return sums['pooled'].statistics(about, spatial), np.concatenate(kept)


def cached_statistics(
    folder, network, source, *, flip: bool = False, seed: int = 0, **options
) -> Statistics:
    """Returns the statistics of a source: cached in the folder, or computed and then cached.

    The file name ends with a hash of `source.about`, the number of images, `network.about` and the
    flips; the file repeats them all. A source without `about` is not cached. All processes must
    call this function, and all get the statistics; only the first process reads and writes the
    folder.
    """
    # The kind follows from the rest, and files of version 0.1 lack it.
    known = getattr(source, 'about', {})
    about = {
        'source': {name: value for name, value in known.items() if name != 'kind'},
        'images': len(source),
        'network': network.about,
        'flip': flip,
        'flip_seed': seed if flip else None,
        'format': 'tarflow_jax',
    }
    about = json.loads(json.dumps(about))  # converts tuples to lists, as in the file
    compute = functools.partial(
        statistics_of, network, source, flip=flip, seed=seed, about=about, **options
    )
    if not about['source']:
        return compute()
    path = _path(paths.of(folder), about)
    kept = from_first(_kept(path, about) if jax.process_index() == 0 else None)
    if kept is not None:
        return kept
    statistics = compute()
    if jax.process_index() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            statistics_files.write(path, statistics)
        except OSError as error:
            log.warning('the statistics cannot be cached: %s', error)
    return statistics


def _stream(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


@functools.lru_cache(maxsize=2)
def _compiled(features):
    # Each access makes a new bound method, which jax.jit would compile again.
    return jax.jit(features)


def _path(folder: Path, about: dict) -> Path:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    source = about['source']
    words = [str(source[name]) for name in ('dataset', 'split') if name in source]
    words += ['flipped'] * about['flip']
    readable = re.sub(r'[^\w.]+', '-', '-'.join(words or ['statistics'])).strip('-')
    return folder / f'{readable[:80]}-{digest}.npz'


def _kept(path: Path, about: dict) -> Statistics | None:
    if not path.exists():
        return None
    try:
        kept = statistics_files.read(path)
    except (ValueError, OSError) as error:
        log.warning('computing the statistics again: %s', error)
        return None
    return kept if kept.about == about else None
