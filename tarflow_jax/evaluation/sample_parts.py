"""Unfinished sets of samples, as finished images and parts.

A part is a file `parts/FIRST.npz` in the folder of the set, written atomically. It has one batch of
`bulk`, starting at image FIRST. Each array has a checksum.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tarflow_jax import files, paths
from tarflow_jax.data import arrays
from tarflow_jax.evaluation import sample_files
from tarflow_jax.training.over_set import images_of

READ_AT_ONCE = 1000  # finished images to read at once

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The images `first` to `last` - 1, which `load` reads.

    `load` returns 'pixels' uint8 [n, H, W, C], and for a part also 'redraws' and 'finite' [n].
    """

    first: int
    last: int
    load: Callable[[], dict]
    part: Path | None = None  # the file, if this is a part


def finished(folder: Path, fingerprint: dict) -> tuple[dict, list[Stretch]]:
    """Returns the contents of `samples.json`, and its images if they exist.

    Raises:
      ValueError: if they have another fingerprint.
    """
    nothing = {'count': 0, 'redraws': 0, 'redrawn': 0, 'not_finite': 0}
    about = sample_files.read_about(folder)
    if about is None:
        return nothing, []
    if about.get('fingerprint') != fingerprint:
        raise ValueError(
            f'{folder} has samples with another fingerprint (see its {sample_files.ABOUT}); choose '
            'another folder.'
        )
    count = about['count']
    try:
        source = sample_files.open_samples(folder, count)
    except (FileNotFoundError, ValueError) as error:
        log.warning('%s Sampling its images again.', error)
        return nothing, []

    def load(first: int, last: int) -> dict:
        return {'pixels': images_of(source, range(first, last))}

    edges = [*range(0, count, READ_AT_ONCE), count]
    return about, [Stretch(a, b, functools.partial(load, a, b)) for a, b in zip(edges, edges[1:])]


def parts(folder: Path, shape) -> list[Stretch]:
    """Returns the complete parts with images of this shape; removes other parts."""
    found = []
    for path in sorted((folder / 'parts').glob('*.npz')):
        try:
            pixels = _load(path)['pixels']
            if pixels.shape[1:] != shape:
                raise ValueError(f'it has images {list(pixels.shape[1:])}')
            found.append(_stretch(path, len(pixels)))
        except (ValueError, OSError) as error:
            log.warning('%s is damaged (%s); sampling its images again', path, error)
            paths.remove_tree(path) if path.is_dir() else path.unlink()
    return found


def write(folder: Path, first: int, part: dict) -> Stretch:
    """Writes 'pixels', 'redraws' and 'finite' as a part that starts at image `first`."""
    path = folder / 'parts' / f'{first:08d}.npz'
    with files.replacing(path) as file:
        np.savez(file, **part)
    return _stretch(path, len(part['pixels']))


def _load(path: Path) -> dict:
    path = paths.local_copy(path)
    members = arrays.members(path)
    kinds = {'pixels': 'u', 'redraws': 'i', 'finite': 'b'}
    if not kinds.keys() <= members.keys():
        raise ValueError(f'it has {", ".join(members)[:60] or "nothing"}')
    part = {name: arrays.read(path, members[name]) for name in kinds}
    if any(part[name].dtype.kind != kind for name, kind in kinds.items()) or not (
        part['pixels'].ndim == 4 and part['pixels'].dtype == np.uint8
        and part['pixels'].shape[:1] == part['redraws'].shape == part['finite'].shape
    ):
        raise ValueError('its arrays have wrong types or shapes')
    return part


def _stretch(part: Path, images: int) -> Stretch:
    first = int(part.stem)
    return Stretch(first, first + images, functools.partial(_load, part), part)


def missing(stretches: list[Stretch], count: int, batch_size: int) -> list[tuple[int, int]]:
    """Returns batches (first, last + 1) of the images below `count` that no stretch has."""
    batches, first = [], 0
    while first < count:
        there = [s.last for s in stretches if s.first <= first < s.last]
        if there:
            first = max(there)
            continue
        last = min([first + batch_size, count, *(s.first for s in stretches if s.first > first)])
        batches.append((first, last))
        first = last
    return batches


def in_order(stretches: list[Stretch], count: int, totals: dict) -> Iterator[np.ndarray]:
    """Yields the pixels [n, H, W, C] of all stretches, images 0 to `count` - 1.

    Updates the totals 'redraws', 'redrawn' and 'not_finite' for parts. Finished images come first;
    the totals already include them.
    """
    first = 0
    while first < count:
        stretch = next(s for s in stretches if s.first <= first < s.last)
        piece = {
            name: x[first - stretch.first : count - stretch.first]
            for name, x in stretch.load().items()
        }
        if stretch.part:
            totals['redraws'] += int(piece['redraws'].sum())
            totals['redrawn'] += int((piece['redraws'] > 0).sum())
            totals['not_finite'] += int((~piece['finite']).sum())
        yield piece['pixels']
        first = stretch.last


def are_left(folder: Path) -> bool:
    """Returns whether there are parts, or files of a run that was killed."""
    return (folder / 'parts').exists() or any(folder.glob('*.tmp'))


def remove(folder: Path, stretches: list[Stretch], count: int) -> None:
    """Removes the parts below `count`, and the files of runs that were killed."""
    for stretch in stretches:
        if stretch.part and stretch.last <= count:
            stretch.part.unlink()
    if not any((folder / 'parts').glob('*.npz')):
        paths.remove_tree(folder / 'parts')
    for left in folder.glob('*.tmp'):
        paths.remove_tree(left) if left.is_dir() else left.unlink()
