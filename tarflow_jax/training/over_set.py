"""One pass over a whole dataset: scores every image on all devices and gathers the results."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from tarflow_jax.data import pipeline
from tarflow_jax.training import sharding


def over_set(
    score: Callable, source, *, mesh, batch_size: int, key: jax.Array, draws: int = 1,
    what: str | None = None,
):
    """Computes `score(batch, keys)` for every image of a source, with several draws of the noise.

    The key of an image depends only on `key`, the draw and the index of the image. So the numbers
    do not depend on the batch size, the mesh or the number of processes.

    Args:
      score: a jitted function of {'image': uint8 [B, H, W, C], 'label': int32 [B]}, with 'features'
        if the source has them, and keys [B] that returns a tree of arrays [B, ...].
      source: see `data.sources`.
      batch_size: images per batch; reduced to the size of the source, then rounded up to a multiple
        of the shards of the batch axis.
      what: the label of the progress bar; None for no bar.
    Returns:
      the tree with NumPy arrays [draws, len(source), ...], the same on every process.
    """
    found = [[] for _ in range(draws)]
    keys = _keys(sharding.batch_sharding(mesh))
    for first, batch, mask in batches(source, mesh=mesh, batch_size=batch_size, what=what):
        for draw in range(draws):
            scores = score(batch, keys(key, draw, first, mask.size))
            scores = sharding.to_host(scores)
            found[draw].append(jax.tree.map(lambda x, mask=mask: x[mask], scores))
    together = [jax.tree.map(lambda *parts: np.concatenate(parts), *parts) for parts in found]
    return jax.tree.map(lambda *draws: np.stack(draws), *together)


def batches(
    source, *, mesh, batch_size: int, what: str | None
) -> Iterator[tuple[int, dict, np.ndarray]]:
    """Yields a source in order, sharded over the mesh: (index of the first image, batch, mask).

    The mask, bool [B], is False for padding in the last batch.
    """
    batch_size = sharding.round_up(min(batch_size, len(source)), mesh)
    rows = sharding.local_rows(mesh, batch_size)
    bar = tqdm(
        total=len(source), desc=what, unit='image', leave=False,
        disable=None if what is not None and jax.process_index() == 0 else True,
    )
    with bar:
        for i, batch in enumerate(
            pipeline.eval_batches(source, batch_size=batch_size, rows=rows)
        ):
            batch = sharding.to_devices(batch, mesh, batch_size)
            first = i * batch_size
            mask = np.arange(first, first + batch_size) < len(source)
            del batch['mask']
            yield first, batch, mask
            bar.update(int(mask.sum()))


@dataclasses.dataclass(frozen=True)
class View:
    """A source with some images of another source, optionally changed.

    Args:
      indices: indices of the images in the other source.
      change: function of (index in the view, image uint8 [H, W, C]) that returns another image.
      about: see `data.sources`; empty if unknown.
    """

    source: object
    indices: Sequence[int]
    change: Callable | None = None
    about: dict = dataclasses.field(default_factory=dict)

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, i):
        element = self.source[self.indices[i]]
        if self.change is None:
            return element
        return element | {'image': self.change(i, element['image'])}


def evenly_spaced(source, count: int) -> View:
    """Selects `count` evenly spaced images of a source, or all if there are fewer.

    The first images of a dataset are often from a few classes.
    """
    total = len(source)
    count = min(count, total)
    return View(source, [i * total // count for i in range(count)])


def images_of(source, indices) -> np.ndarray:
    """Reads the images at these indices: uint8 [*indices.shape, H, W, C]."""
    shape = (*np.shape(indices), *source[0]['image'].shape)
    return np.array([source[int(i)]['image'] for i in np.ravel(indices)], np.uint8).reshape(shape)


@functools.cache
def _keys(where) -> Callable:
    @functools.partial(jax.jit, static_argnums=3)
    def keys(key, draw, first, count):
        of_draw = jax.random.fold_in(key, draw)
        keys = jax.vmap(lambda i: jax.random.fold_in(of_draw, i))(first + jnp.arange(count))
        return jax.lax.with_sharding_constraint(keys, where)

    return keys
