"""Writes the `.pth` file of `torch.save(state_dict, path)` without torch; see `torch_file`.

`torch_file` describes the format. A state dict of dense tensors needs a dozen pickle opcodes and no
memo.
"""

import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from tarflow_jax import files, paths
from tarflow_jax.torch_pickle import STORAGES

# Storage type of each dtype, by name: 'torch', 'FloatStorage'.
_STORAGES = {dtype.name: name.split('.') for name, dtype in STORAGES.items()}

_PROTOCOL_2 = b'\x80\x02'
_STOP = b'.'
_MARK, _TUPLE, _EMPTY_TUPLE = b'(', b't', b')'
_SET_ITEMS = b'u'
_CALL = b'R'
_PERSISTENT_ID = b'Q'
_FALSE = b'\x89'


def write_torch_file(path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as an OrderedDict of tensors, each with its own storage.

    `torch.load(path, weights_only=True)` and `torch_file.read_torch_file` read them back. The file
    is written atomically and replaces an existing one. Equal arrays give equal files.

    Raises:
      FileNotFoundError: if the folder of `path` does not exist.
      ValueError: if torch has no storage for the dtype of an array.
    """
    path = paths.of(path)
    if not paths.can_hold_files(path.parent):
        raise FileNotFoundError(f'the folder {path.parent} does not exist; create it first.')
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.name not in _STORAGES:
            raise ValueError(
                f'{name} is {array.dtype}, which cannot be written as a torch tensor; cast it to '
                f'one of {", ".join(_STORAGES)}.'
            )
    with files.replacing(path) as file, zipfile.ZipFile(file, 'w') as archive:

        def put(name: str, data: bytes) -> None:
            archive.writestr(zipfile.ZipInfo(f'archive/{name}'), data)  # stored, and undated

        put('data.pkl', _state_dict(arrays))
        put('byteorder', b'little')
        for key, array in enumerate(arrays.values()):
            put(f'data/{key}', array.astype(array.dtype.newbyteorder('<')).tobytes())
        put('version', b'3\n')


def _state_dict(arrays: dict[str, np.ndarray]) -> bytes:
    items = [_text(name) + _tensor(str(key), a) for key, (name, a) in enumerate(arrays.items())]
    return b''.join([_PROTOCOL_2, _ordered_dict(), _MARK, *items, _SET_ITEMS, _STOP])


def _tensor(key: str, array: np.ndarray) -> bytes:
    """Encodes _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)."""
    kind = _global(*_STORAGES[array.dtype.name])
    place = [_text('storage'), kind, _text(key), _text('cpu'), _integer(array.size)]
    stride = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
    arguments = [
        _tuple(place) + _PERSISTENT_ID,
        _integer(0),
        _tuple(map(_integer, array.shape)),
        _tuple(map(_integer, stride)),
        _FALSE,
        _ordered_dict(),
    ]
    return _global('torch._utils', '_rebuild_tensor_v2') + _tuple(arguments) + _CALL


def _ordered_dict() -> bytes:
    return _global('collections', 'OrderedDict') + _EMPTY_TUPLE + _CALL


def _global(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()


def _tuple(items) -> bytes:
    return _MARK + b''.join(items) + _TUPLE


def _text(text: str) -> bytes:
    data = text.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def _integer(number: int) -> bytes:
    if number < 2**31:
        return b'J' + struct.pack('<i', number)
    return b'\x8a\x08' + struct.pack('<q', number)
