"""Features of a whole source on a mesh, and the statistics of them, kept in files.

A network is any object with `variables`, `features(variables, uint8 [B, H, W, C]) -> dict` with
'pooled' [B, D] and perhaps 'spatial' [B, E], and `about`, a dict that JSON can hold.
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
    """Features of all images of a source, batch by batch and in its order, on every process.

    Args:
      source: see `data.sources`.
      flip: whether to mirror half of the images, left to right, as training sets are for the
        statistics of the official code. Which ones depends on the seed and on an image's place
        in the source alone.
      what: for the progress bar.
    Returns:
      An iterator of {'pooled': float32 [b, D], ...}; all processes must go through it.
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
    """Statistics of the features of a source; `options` are those of `features_of`."""
    return statistics_and_features(network, source, keep=0, about=about, **options)[0]


def statistics_and_features(
    network, source, *, keep: int, about: dict, seed: int = 0, **options
) -> tuple[Statistics, np.ndarray]:
    """Statistics, and the pooled features float32 [min(keep, images), D] of a random subset.

    The subset, drawn by the seed and in the order of the source, is for precision and recall: the
    first images of a set are often all of a few classes.
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
        raise ValueError(f'{done} image(s) have no statistics; choose a set of at least 2.')
    spatial = sums['spatial'].statistics({}) if 'spatial' in sums else None
    return sums['pooled'].statistics(about, spatial), np.concatenate(kept)


def cached_statistics(
    folder, network, source, *, flip: bool = False, seed: int = 0, **options
) -> Statistics:
    """Statistics of a source, from a file in the folder if it holds them, else computed and kept.

    The file's name ends with a hash of `source.about`, which says all that distinguishes a set,
    the number of images, `network.about` and the flips; the file says all of them again. A source
    without `about` is computed each time. Of several processes the first reads and writes, so
    the folder may be on its own disk; all must call this, and all get the statistics.
    """
    # The kind follows from the rest, and files of version 0.1 do not have it.
    known = getattr(source, 'about', {})
    about = {
        'source': {name: value for name, value in known.items() if name != 'kind'},
        'images': len(source),
        'network': network.about,
        'flip': flip,
        'flip_seed': seed if flip else None,
        'format': 'tarflow_jax',
    }
    about = json.loads(json.dumps(about))  # as it will be read: no tuples
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
            log.warning('the statistics are not kept for the next time: %s', error)
    return statistics


def _stream(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


@functools.lru_cache(maxsize=2)
def _compiled(features):
    # Bound methods of one object are equal but not the same, and jax.jit would compile each.
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
        log.warning('The statistics are computed again: %s', error)
        return None
    return kept if kept.about == about else None
