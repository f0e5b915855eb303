"""Reads and writes files of reference statistics, in the formats of other evaluation suites.

A `.npz` file has `mu` [D] and `sigma` [D, D] (the suite of EDM); that of ADM also has `mu_s` and
`sigma_s` of the spatial features, and often images, `arr_0`. Files written here also have
`manifest`, a JSON text with the count and the origin of the numbers. Both suites can read them, but
ADM's precision and recall also need images in the file.

A `.pth` file is the state dict of torchmetrics' FrechetInceptionDistance, which the official
TarFlow code uses: the sums of x and of x x^T, and the count.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tarflow_jax import files, json_files, paths
from tarflow_jax.data import arrays
from tarflow_jax.evaluation.frechet import Statistics
from tarflow_jax.torch_file import read_torch_file
from tarflow_jax.torch_writer import write_torch_file

_TORCHMETRICS = ('features_sum', 'features_cov_sum', 'features_num_samples')


def read(path) -> Statistics:
    """Reads statistics from a file of any of these formats, detected by its contents.

    `about['format']` is 'adm', 'edm', 'tarflow_jax' or 'torchmetrics'. From torchmetrics' state it
    reads the real features. It executes no pickle.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged, is in another format, lacks anything, or has numbers that
        are not finite.
    """
    path = paths.local_copy(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file; pass statistics as .npz or .pth.')
    with path.open('rb') as file:
        magic = file.read(2)
    if magic.startswith(b'\x80'):
        raise ValueError(
            f'{path} is a pickle, as written by the suite of EDM2 and older versions of torch. A '
            'pickle is a program and is not executed here; save mu and sigma with numpy.savez.'
        )
    if magic != b'PK':
        raise ValueError(
            f'{path} starts with {magic!r}, so it is neither a .npz nor a .pth of torch.'
        )
    with _damage(path):
        members = arrays.members(path)
    if any(name.endswith('/data.pkl') for name in members):
        return _from_torchmetrics(path, read_torch_file(path))
    return _from_npz(path, members)


def write(path, statistics: Statistics) -> None:
    """Writes statistics as `.npz`, or as `.pth` for torchmetrics.

    The `.pth` file has no spatial features, no `about` and no network weights; load it in
    torchmetrics with `load_state_dict(torch.load(path), strict=False)`. The file is written
    atomically and replaces an existing one.

    Raises:
      FileNotFoundError: if the folder of `path` does not exist.
      ValueError: if `path` has another suffix, or `.pth` needs a count that is unknown.
    """
    path = paths.of(path)
    if path.suffix not in ('.npz', '.pth'):
        raise ValueError(f'{path} ends with {path.suffix!r}; choose a name in .npz or .pth.')
    if not paths.can_hold_files(path.parent):
        raise FileNotFoundError(f'the folder {path.parent} does not exist; create it first.')
    if path.suffix == '.pth':
        write_torch_file(path, _torchmetrics_state(path, statistics))
        return
    content = {'mu': statistics.mean, 'sigma': statistics.covariance}
    if statistics.spatial is not None:
        content |= {'mu_s': statistics.spatial.mean, 'sigma_s': statistics.spatial.covariance}
    about = {name: value for name, value in statistics.about.items() if name != 'format'}
    manifest = {'format': 'tarflow_jax', 'count': statistics.count, 'about': about}
    content['manifest'] = np.array(json.dumps(manifest, sort_keys=True))
    with files.replacing(path) as file:
        np.savez(file, **content)


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(
            f'{path} is damaged, or has Python objects, which are not loaded ({error}); copy it '
            'again, or write it with numpy.savez from arrays of numbers.'
        ) from None


def _from_npz(path: Path, members: dict) -> Statistics:
    pairs = [('mu', 'sigma')] + [('mu_s', 'sigma_s')] * ('mu_s' in members or 'sigma_s' in members)
    wanted = [name for pair in pairs for name in pair]
    _need(path, members, wanted)
    wanted += ['manifest'] * ('manifest' in members)
    with _damage(path):
        found = {name: arrays.read(path, members[name]) for name in wanted}
    if 'manifest' in found:
        count, about = _manifest(path, found['manifest'])
    else:
        count, about = None, {'format': 'adm' if 'mu_s' in found else 'edm'}
    spatial = None
    if len(pairs) == 2:
        spatial = _statistics(path, count, found['mu_s'], found['sigma_s'], {})
    return _statistics(path, count, found['mu'], found['sigma'], about, spatial)


def _manifest(path: Path, text: np.ndarray) -> tuple[int | None, dict]:
    shape = {'format': str, 'count': (int, None), 'about': dict}
    try:
        if text.dtype.kind == 'U' and text.ndim == 0:
            manifest = json_files.parse(str(text), shape)
            if manifest['format'] == 'tarflow_jax':
                return manifest['count'], manifest['about'] | {'format': 'tarflow_jax'}
    except json_files.Damaged:
        pass
    raise ValueError(
        f'{path} has a manifest that was not written here ({str(text)[:60]!r}); leave it out, or '
        'compute the statistics again.'
    )


def _from_torchmetrics(path: Path, state: dict[str, np.ndarray]) -> Statistics:
    names = [f'real_{name}' for name in _TORCHMETRICS]
    _need(path, state, names)
    total, outer, count = (state[name] for name in names)
    if count.shape != () or count.dtype.kind not in 'iu' or count < 2:
        raise ValueError(
            f'{path} has {names[2]} = {str(count)[:60]}, but it must be the number of images, at '
            'least 2.'
        )
    count = int(count)
    _check_numbers(path, **{names[0]: total, names[1]: outer})
    total, outer = total.astype(np.float64), outer.astype(np.float64)
    if total.ndim != 1 or outer.shape != total.shape * 2:
        raise ValueError(
            f'{path} has {names[0]} {list(total.shape)} and {names[1]} {list(outer.shape)}, but '
            'they must be [D] and [D, D].'
        )
    mean = total / count
    covariance = (outer - count * np.outer(mean, mean)) / (count - 1)
    return _statistics(path, count, mean, covariance, {'format': 'torchmetrics'})


def _torchmetrics_state(path: Path, statistics: Statistics) -> dict[str, np.ndarray]:
    if statistics.count is None:
        raise ValueError(
            f'{path} needs the number of images, which the statistics do not have; write .npz.'
        )
    count, mean = statistics.count, statistics.mean
    outer = statistics.covariance * (count - 1) + count * np.outer(mean, mean)
    state = dict(zip(_TORCHMETRICS, (count * mean, outer, np.int64(count))))
    real = {f'real_{name}': array for name, array in state.items()}
    return real | {f'fake_{name}': np.zeros_like(array) for name, array in state.items()}


def _need(path: Path, names, needed: list[str]) -> None:
    missing = [name for name in needed if name not in names]
    if missing:
        held = ', '.join(sorted(names)[:6])[:200] or 'nothing'
        raise ValueError(
            f'{path} lacks {", ".join(missing)} (it has {held}); pass statistics of the suite of '
            'ADM or EDM, or the state of torchmetrics\' FrechetInceptionDistance.'
        )


def _check_numbers(path: Path, **given: np.ndarray) -> None:
    for name, array in given.items():
        if array.dtype.kind not in 'fiu':
            raise ValueError(f'{path}: {name} is {array.dtype}, but must be real numbers.')


def _statistics(path, count, mean, covariance, about, spatial=None) -> Statistics:
    _check_numbers(path, mu=mean, sigma=covariance)
    try:
        return Statistics(
            count, mean.astype(np.float64), covariance.astype(np.float64), about, spatial
        )
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
