"""Reads the `.pth` file of `torch.save(model.state_dict(), path)` without torch.

Since PyTorch 1.6, such a file is a zip archive of stored (never compressed) entries:
`<name>/data.pkl`, a protocol-2 pickle that describes the tensors, and `<name>/data/<key>`, the raw
numbers of one storage. Earlier files are a sequence of five pickles (a magic number, the protocol
version, properties of the machine, the description of the tensors, the list of storage keys),
followed for each key by the count of its numbers (8 bytes) and the numbers. They have no checksums.
Source: the "Serialization semantics" note of the PyTorch documentation.

`torch_pickle` interprets the pickles without unpickling them, so no code in them is executed.
"""

import collections
import contextlib
import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from tarflow_jax import wrong_files
from tarflow_jax.torch_pickle import TRUST, Tensor, interpret, short, state_dict

# Enough for 25,000 tensors. A hostile pickle costs up to 2 seconds and 100 MB of memory per MiB.
_MAX_PICKLE_BYTES = 4 * 2**20

# The first two pickles of the format before PyTorch 1.6: its magic number and version 1001.
_LEGACY_START = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.'


def read_torch_file(path) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict written by `torch.save`, by name, in file order.

    It is safe for hostile files: it imports and calls nothing that the file names, and uses at most
    a few times the file's size plus 0.5 GB of memory.

    Args:
      path: a file in the zip format, the default of `torch.save` since PyTorch 1.6, or in the
        format before.
    Returns:
      Read-only arrays with the shape and dtype of each tensor (bfloat16 as `ml_dtypes.bfloat16`).
      Tensors that share a storage share memory.
    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file is damaged, is in neither format, or is not a dict of dense tensors
        with string keys.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; pass the path of a .pth checkpoint.')
    if not path.is_file():
        raise ValueError(f'{path} is not a file; pass the path of a .pth checkpoint.')
    with path.open('rb') as file:
        start = file.read(len(_LEGACY_START))
        if not start.startswith((b'PK', _LEGACY_START)):
            start = f'starts with {start[:4]!r}, unlike a file of torch.save'
            what = wrong_files.described(path) or start
            raise ValueError(f'{path} {what}; pass a .pth file that torch.save wrote.')
        try:
            legacy = start == _LEGACY_START
            contents = _read_legacy(file, path.stat().st_size) if legacy else _read_zip(path)
            return {
                name: _array(f'tensor {short(name)}', tensor, contents)
                for name, tensor in contents.state.items()
            }
        except _NoPickle as error:
            what = wrong_files.described(path) or f': {error}'
            raise ValueError(f'{path} {what}; pass a .pth file that torch.save wrote.') from None
        except ValueError as error:
            raise ValueError(f'{path}: {error}.') from None


class _NoPickle(ValueError):
    """A zip archive that torch.save did not write."""


# zipfile raises more than BadZipFile on damaged archives.
_ZIP_ERRORS = (
    zipfile.BadZipFile, EOFError, OSError, OverflowError, RuntimeError, ValueError, struct.error
)


@contextlib.contextmanager
def _damage_of(what: str) -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ValueError(f'{what} is truncated or damaged ({error}); copy the file again') from None


class _Contents(NamedTuple):
    """A file: its tensors, the bytes of its storages, and a function that names a storage."""

    state: dict[str, Tensor]
    storages: dict[str, bytes]
    name: Callable[[str], str]


def _read_zip(path: Path) -> _Contents:
    with _damage_of('the zip archive'):
        archive = zipfile.ZipFile(path)
    with archive:
        entries = _entries(archive, path.stat().st_size)

        def read(name: str) -> bytes:
            with _damage_of(f'the zip entry {name[:100]!r}'):
                return archive.read(entries[name])

        pickle_size = entries['data.pkl'].file_size
        if pickle_size > _MAX_PICKLE_BYTES:
            raise ValueError(
                f'data.pkl has {pickle_size} bytes, but a state dict needs at most '
                f'{_MAX_PICKLE_BYTES}; {TRUST}'
            )
        order = read('byteorder').strip() if 'byteorder' in entries else b'little'
        if order != b'little':
            raise ValueError(
                f'its byte order is {order[:20]!r}; load and save it again with torch on a '
                'little-endian machine'
            )
        state = state_dict(interpret(read('data.pkl')))
        keys = dict.fromkeys(tensor.storage.key for tensor in state.values())
        storages = {key: read(f'data/{key}') for key in keys if f'data/{key}' in entries}
        return _Contents(state, storages, lambda key: f'the zip entry {f"data/{key}"[:100]!r}')


def _entries(archive: zipfile.ZipFile, file_size: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the entries in the archive's only folder by name; raises ValueError for others."""
    entries = archive.infolist()
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f'the zip entry {entry.filename[:100]!r} is compressed, which torch.save never '
                'does; use the file as torch.save wrote it'
            )
    # For stored entries, this bounds everything that can be read, even if entries overlap.
    total = sum(entry.file_size for entry in entries)
    if total > file_size:
        raise ValueError(f'the zip entries claim {total} bytes in a file of {file_size}; {TRUST}')
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names):
        twice = collections.Counter(names).most_common(1)[0][0]
        raise ValueError(f'the zip archive has {twice[:100]!r} twice; {TRUST}')
    pickles = [name for name in names if name.endswith('/data.pkl') and name.count('/') == 1]
    if len(pickles) != 1:
        raise (ValueError if pickles else _NoPickle)(
            f'the zip archive has {len(pickles)} entries <name>/data.pkl instead of one'
        )
    folder = pickles[0].removesuffix('data.pkl')
    return {
        name.removeprefix(folder): entry
        for name, entry in zip(names, entries) if name.startswith(folder)
    }


def _read_legacy(file: BinaryIO, file_size: int) -> _Contents:
    """Reads a file in the format before PyTorch 1.6."""
    file.seek(len(_LEGACY_START))
    pickles = io.BytesIO(file.read(_MAX_PICKLE_BYTES))
    machine = interpret(pickles)
    if type(machine) is not dict or machine.get('little_endian') is not True:
        raise ValueError(
            'its byte order is not little-endian; load and save it again with torch on a '
            'little-endian machine'
        )
    state = state_dict(interpret(pickles))
    keys = interpret(pickles)
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError(f'its storage keys are not a list of strings; {TRUST}')
    needed = {tensor.storage.key: tensor.storage for tensor in state.values()}
    contents = _Contents(state, {}, lambda key: f'the storage {short(key)}')
    position = len(_LEGACY_START) + pickles.tell()
    for key in keys:
        if key in contents.storages or key not in needed:
            raise ValueError(
                f'its storage keys have {short(key)} twice or without a tensor; {TRUST}'
            )
        numel, size = needed[key].numel, needed[key].numel * needed[key].dtype.itemsize
        end = position + 8 + size
        if end > file_size:
            raise ValueError(
                f'the file ends at byte {file_size}, but {contents.name(key)} reaches to byte '
                f'{end}; copy the file again'
            )
        file.seek(position)
        count = int.from_bytes(file.read(8), 'little', signed=True)
        if count != numel:
            raise ValueError(
                f'{contents.name(key)} has {count} numbers, but its tensors need {numel}; copy '
                'the file again'
            )
        contents.storages[key] = file.read(size)
        position = end
    return contents


def _array(label: str, tensor: Tensor, contents: _Contents) -> np.ndarray:
    """Returns the tensor as a read-only view of its storage, after checking every index."""
    (key, dtype, numel), offset, size, stride = tensor
    data = contents.storages.get(key)
    if data is None:
        raise ValueError(f'{label} needs {contents.name(key)}, which is missing; {TRUST}')
    if len(data) != numel * dtype.itemsize:
        raise ValueError(
            f'{label} needs a storage of {numel} {dtype.name} numbers, but '
            f'{contents.name(key)} has {len(data)} bytes; copy the file again'
        )
    if 0 in size:
        # NumPy rejects shapes whose product without zeros overflows.
        if math.prod(max(n, 1) for n in size) >= 2**31:
            raise ValueError(f'{label} is empty but claims the size {size}; {TRUST}')
        return np.zeros(size, dtype)
    # The stride of an axis of length 1 is unused and can have any value.
    stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if last >= numel:
        raise ValueError(
            f'{label} (size {size}, stride {stride}, offset {offset}) reaches element {last} of a '
            f'storage of {numel}; {TRUST}'
        )
    # Strides of 0 could claim any size; torch.save keeps those of an expanded tensor.
    if math.prod(size) > numel:
        raise ValueError(
            f'{label} (size {size}, stride {stride}) has more elements than its storage '
            f'({numel}); save it as tensor.contiguous()'
        )
    storage = np.frombuffer(data, dtype)
    return np.lib.stride_tricks.as_strided(
        storage[offset:], size, [step * dtype.itemsize for step in stride], writeable=False
    )
