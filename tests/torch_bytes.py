"""The bytes of `.pth` files, written by hand because torch is not installed."""

import pickle
import struct
import zipfile

import numpy as np
import pytest

from tarflow_jax.torch_file import read_torch_file


class Raw(bytes):
    """Opcodes that `encode` passes through."""


def encode(value) -> bytes:
    """Protocol-2 opcodes that push the value."""
    if isinstance(value, Raw):
        return value
    if value is None or isinstance(value, bool):
        return {None: b'N', True: b'\x88', False: b'\x89'}[value]
    if isinstance(value, int):
        if not 0 <= value < 2**31:
            return b'\x8a\x0a' + value.to_bytes(10, 'little', signed=True)
        return b'J' + struct.pack('<i', value)
    if isinstance(value, float):
        return b'G' + struct.pack('>d', value)
    if isinstance(value, str):
        data = value.encode()
        return b'X' + struct.pack('<I', len(data)) + data
    if isinstance(value, tuple):
        return b'(' + b''.join(map(encode, value)) + b't'
    if isinstance(value, list):
        return b'](' + b''.join(map(encode, value)) + b'e'
    if isinstance(value, dict):
        items = b''.join(encode(k) + encode(v) for k, v in value.items())
        return b'}(' + items + b'u'
    raise TypeError(type(value))


def name_of(module, name) -> Raw:
    return Raw(f'c{module}\n{name}\n'.encode())


def call(module, name, *arguments) -> Raw:
    return Raw(name_of(module, name) + encode(arguments) + b'R')


def storage(key='0', numel=6, kind='FloatStorage', *view) -> Raw:
    """A reference to a storage; the format before PyTorch 1.6 adds the `view` None."""
    return Raw(encode(('storage', name_of('torch', kind), key, 'cpu', numel, *view)) + b'Q')


def tensor(size=(2, 3), stride=(3, 1), offset=0, where=None, flags=()) -> Raw:
    hooks = call('collections', 'OrderedDict')
    return call(
        'torch._utils',
        '_rebuild_tensor_v2',
        *(where or storage(), offset, size, stride, False, hooks, *flags),
    )


NUMBERS = np.arange(6, dtype='<f4')


def write(path, state, storages=None, byteorder=b'little', compression=zipfile.ZIP_STORED):
    """A `.pth` file of the encoded state (bytes are a whole pickle)."""
    data = b'\x80\x02' + encode(state) + b'.' if type(state) is not bytes else state
    with zipfile.ZipFile(path, 'w', compression) as archive:
        archive.writestr('model/data.pkl', data)
        archive.writestr('model/byteorder', byteorder)
        for key, numbers in (storages or {'0': NUMBERS.tobytes()}).items():
            archive.writestr(f'model/data/{key}', numbers)
    return path


def refusal(path) -> str:
    with pytest.raises(ValueError) as error:
        read_torch_file(path)
    message = str(error.value)
    assert message.startswith(str(path)) and message.endswith('.') and '\n' not in message
    return message.removeprefix(str(path))


# The magic number and the version with which the format before PyTorch 1.6 begins.
LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
MACHINE = {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {'int': 4}}


def write_legacy(path, state, storages=None, machine=MACHINE, keys=None):
    """A file in the format before PyTorch 1.6; `storages` are arrays by their keys."""
    storages = {'0': NUMBERS} if storages is None else storages
    pickles = (machine, state, list(storages) if keys is None else keys)
    with path.open('wb') as file:
        file.write(LEGACY_START)
        for value in pickles:
            file.write(b'\x80\x02' + encode(value) + b'.')
        for numbers in storages.values():
            file.write(struct.pack('<q', numbers.size) + numbers.tobytes())
    return path


def legacy_state(arrays) -> tuple[dict, dict]:
    """State and storages for `write_legacy` of float32 arrays by their names."""
    state, storages = {}, {}
    for number, (name, array) in enumerate(arrays.items()):
        stride = tuple(step // array.itemsize for step in array.strides)
        where = storage(str(number), array.size, 'FloatStorage', None)
        state[name] = tensor(array.shape, stride, where=where)
        storages[str(number)] = array
    return state, storages


def refusals_of_damage(path, whole: bytes, times: int) -> int:
    """How often a file with three bytes changed at random is refused; anything else is read."""
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(times):
        data = np.frombuffer(whole, np.uint8).copy()
        data[rng.integers(len(data), size=3)] = rng.integers(256, size=3)
        path.write_bytes(data.tobytes())
        try:
            read_torch_file(path)
        except ValueError:
            refused += 1
    return refused
