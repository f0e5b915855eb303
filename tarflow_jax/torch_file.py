"""Reads the `.pth` file of `torch.save(model.state_dict(), path)` without torch.

Such a file is a zip archive of stored (never compressed) entries: `<name>/data.pkl`, a protocol-2
pickle that describes the tensors, and `<name>/data/<key>`, the raw numbers of one storage each.
Source: the "Serialization semantics" note of the PyTorch documentation, and `pickletools`.

A pickle is a program, and `pickle.Unpickler` runs it: even one that may import nothing can be made
to exhaust the memory (a memo index of four bytes) or the C stack (a deeply nested dict key). So
the pickle is never unpickled. `_interpret` follows the few opcodes that a state dict needs, in
plain Python, and has no means of calling or importing what the file names.
"""

import collections
import math
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

# Room for 25,000 tensors. A hostile pickle costs up to 2 seconds and 100 MB of memory a MiB.
_MAX_PICKLE_BYTES = 4 * 2**20

_STORAGES = {
    'torch.FloatStorage': np.dtype('<f4'),
    'torch.DoubleStorage': np.dtype('<f8'),
    'torch.HalfStorage': np.dtype('<f2'),
    'torch.BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
    'torch.LongStorage': np.dtype('<i8'),
    'torch.IntStorage': np.dtype('<i4'),
    'torch.ShortStorage': np.dtype('<i2'),
    'torch.CharStorage': np.dtype('i1'),
    'torch.ByteStorage': np.dtype('u1'),
    'torch.BoolStorage': np.dtype('?'),
}
_ORDERED_DICT = 'collections.OrderedDict'
_TENSOR = 'torch._utils._rebuild_tensor_v2'
_PARAMETER = 'torch._utils._rebuild_parameter'

_PUSH_ARGUMENT = {'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE'}
_PUSH_CONSTANT = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_TUPLE_SIZES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}

_TRUST = (
    'read only files from a source you trust, and save the state dict alone with '
    'torch.save(model.state_dict(), path)'
)


class _Global(NamedTuple):
    name: str


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path) -> dict[str, np.ndarray]:
    """Tensors of a state dict that `torch.save` wrote, by name, in the order of the file.

    Safe on hostile files: nothing that the file names is imported or called, and memory is bounded
    by a few times the file's size plus 0.5 GB.

    Args:
      path: a file in the zip format, the default of `torch.save` since PyTorch 1.6.
    Returns:
      Read-only arrays with the shape and dtype of each tensor (bfloat16 as `ml_dtypes.bfloat16`).
      Tensors that share a storage share memory.
    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is damaged, is not in the zip format, or holds anything but a dict
        of dense tensors with string keys.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist; give the path of a .pth checkpoint.')
    if not path.is_file():
        raise ValueError(f'{path} is not a file; give the path of a .pth checkpoint.')
    with path.open('rb') as file:
        _check_magic(path, file.read(4))
    try:
        with _open(path) as archive:
            records = _Records(archive, path.stat().st_size)
            state = _state_dict(_interpret(records.read('data.pkl')))
            return {name: _array(name, tensor, records) for name, tensor in state.items()}
    except ValueError as error:
        raise ValueError(f'{path}: {error}.') from None


def _check_magic(path: Path, magic: bytes) -> None:
    if magic.startswith(b'\x80'):
        raise ValueError(
            f'{path} is a bare pickle, the format of torch.save before PyTorch 1.6; convert it '
            'with torch.save(torch.load(path), new_path) in a recent PyTorch.'
        )
    if not magic.startswith(b'PK'):
        raise ValueError(
            f'{path} starts with {magic!r} and is no zip archive; give a .pth file that '
            'torch.save wrote.'
        )


# zipfile raises more than BadZipFile on damaged archives.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    struct.error,
)


def _open(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except _ZIP_ERRORS as error:
        raise ValueError(
            f'the zip archive is truncated or damaged ({error}), copy the file again'
        ) from None


class _Records:
    """The entries of the archive by their name inside its one folder, each read at most once."""

    def __init__(self, archive: zipfile.ZipFile, file_size: int):
        self._archive = archive
        self._cache: dict[str, bytes] = {}
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise ValueError(
                    f'the zip entry {entry.filename[:100]!r} is compressed, which torch.save never '
                    'does; use the file as torch.save wrote it'
                )
        # With stored entries this bounds all that can be read, overlapping entries included.
        total = sum(entry.file_size for entry in entries)
        if total > file_size:
            raise ValueError(
                f'the zip entries claim {total} bytes in a file of {file_size}; {_TRUST}'
            )
        if len(set(names)) != len(names):
            twice = collections.Counter(names).most_common(1)[0][0]
            raise ValueError(f'the zip archive holds {twice[:100]!r} twice; {_TRUST}')
        folders = [name[: -len('data.pkl')] for name in names if name.endswith('/data.pkl')]
        folders = [folder for folder in folders if folder.count('/') == 1]
        if len(folders) != 1:
            raise ValueError(
                f'the zip archive holds {len(folders)} entries <name>/data.pkl instead of one; '
                'give a .pth file that torch.save wrote'
            )
        self._entries = {
            name.removeprefix(folders[0]): entry
            for name, entry in zip(names, entries)
            if name.startswith(folders[0])
        }
        pickle_size = self.size('data.pkl')
        if pickle_size > _MAX_PICKLE_BYTES:
            raise ValueError(
                f'data.pkl has {pickle_size} bytes where a state dict needs at most '
                f'{_MAX_PICKLE_BYTES}; {_TRUST}'
            )
        if 'byteorder' in self._entries and self.read('byteorder').strip() != b'little':
            raise ValueError(
                f'its byte order is {self.read("byteorder")[:20]!r}; load and save it again with '
                'torch on a little-endian machine'
            )

    def size(self, name: str) -> int | None:
        """Length of an entry in bytes, None if the archive does not hold it."""
        return self._entries[name].file_size if name in self._entries else None

    def read(self, name: str) -> bytes:
        if name not in self._cache:
            try:
                self._cache[name] = self._archive.read(self._entries[name])
            except _ZIP_ERRORS as error:
                raise ValueError(
                    f'the zip entry {name[:100]!r} is truncated or damaged ({error}), copy the '
                    'file again'
                ) from None
        return self._cache[name]


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except ValueError as error:
        reason = str(error)[:200]
        raise ValueError(f'its pickle is damaged ({reason}), copy the file again') from None


def _interpret(data: bytes) -> Any:
    """What the pickle describes, made of dicts, lists, tuples, scalars and `_Tensor`s."""
    try:
        return _follow(data)
    except (IndexError, KeyError):
        raise ValueError(f'its pickle is malformed; {_TRUST}') from None


def _follow(data: bytes) -> Any:
    stack: list = []
    below: list[list] = []  # the stacks put aside at each mark
    memo: dict[int, Any] = {}
    for name, argument in _opcodes(data):
        if name in _PUSH_ARGUMENT:
            # No torch number exceeds int64; larger ones would overflow numpy.
            if type(argument) is int and not -(2**63) <= argument < 2**63:
                raise ValueError(f'its pickle holds a number beyond 64 bits; {_TRUST}')
            stack.append(argument)
        elif name in _PUSH_CONSTANT:
            stack.append(_PUSH_CONSTANT[name])
        elif name == 'EMPTY_DICT':
            stack.append({})
        elif name == 'EMPTY_LIST':
            stack.append([])
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name == 'MARK':
            below.append(stack)
            stack = []
        elif name == 'TUPLE':
            items, stack = tuple(stack), below.pop()
            stack.append(items)
        elif name in _TUPLE_SIZES:
            items = tuple(stack.pop() for _ in range(_TUPLE_SIZES[name]))[::-1]
            stack.append(items)
        elif name == 'APPEND':
            _extend(stack[-2], [stack.pop()])
        elif name == 'APPENDS':
            items, stack = stack, below.pop()
            _extend(stack[-1], items)
        elif name == 'SETITEM':
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == 'SETITEMS':
            items, stack = stack, below.pop()
            _set_items(stack[-1], items)
        elif name == 'GLOBAL':
            stack.append(_global(argument.replace(' ', '.')))
        elif name == 'BINPERSID':
            stack.append(_storage(stack.pop()))
        elif name == 'REDUCE':
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif name == 'BUILD':
            # Attributes of the OrderedDict (torch keeps version numbers there): not needed.
            stack.pop()
            if type(stack[-1]) is not dict:
                raise ValueError(f'its pickle sets attributes of a {_kind(stack[-1])}; {_TRUST}')
        elif name == 'STOP':
            return stack.pop()
        elif name != 'PROTO':
            raise ValueError(
                f'its pickle uses {name}, which no state dict of the default pickle protocol '
                f'(2) needs; {_TRUST}'
            )
    raise IndexError


def _kind(value: Any) -> str:
    return 'tensor' if type(value) is _Tensor else type(value).__name__.strip('_')


def _extend(target: Any, items: list) -> None:
    if type(target) is not list:
        raise ValueError(f'its pickle appends to a {_kind(target)}; {_TRUST}')
    target.extend(items)


def _set_items(target: Any, items: list) -> None:
    if type(target) is not dict or len(items) % 2:
        raise ValueError(f'its pickle sets items of a {_kind(target)}; {_TRUST}')
    for key, value in zip(items[::2], items[1::2]):
        # Only these: the hash of a nested tuple recurses on the C stack without limit.
        if type(key) not in (str, int):
            raise ValueError(f'its pickle holds a dict key of type {_kind(key)}; {_TRUST}')
        if key in target:
            raise ValueError(f'its pickle sets the dict key {_short(key)} twice; {_TRUST}')
        target[key] = value


def _short(key: str | int) -> str:
    return repr(key if type(key) is int or len(key) <= 100 else key[:97] + '...')


def _global(name: str) -> _Global:
    if name in _STORAGES or name in (_ORDERED_DICT, _TENSOR, _PARAMETER):
        return _Global(name)
    raise ValueError(
        f'its pickle names {_short(name)}, which no state dict needs and which was not run; '
        f'{_TRUST}'
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _storage(reference: Any) -> _Storage:
    match reference:
        case ('storage', _Global(name), str(key), str(), int(numel)):
            if name in _STORAGES and _is_size(numel):
                return _Storage(key, _STORAGES[name], numel)
    raise ValueError(f'its pickle holds a malformed reference to a storage; {_TRUST}')


def _reduce(function: Any, arguments: Any) -> Any:
    """The result of the few functions that a state dict calls, by their names alone."""
    match function, arguments:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case _Global(name), (_Tensor() as tensor, bool(), _) if name == _PARAMETER:
            return tensor
        case _Global(name), (_Storage() as s, offset, tuple(size), tuple(stride), _, _, *flags):
            # Flags, such as a pending negation, change what the numbers mean: none is supported.
            plain = name == _TENSOR and not any(flags)
            numbers = all(_is_size(n) for n in (offset, *size, *stride))
            if plain and numbers and len(size) == len(stride) <= 32:
                return _Tensor(s, offset, size, stride)
    called = function.name if type(function) is _Global else f'a {_kind(function)}'
    raise ValueError(
        f'its pickle calls {called} with arguments that torch.save does not write; {_TRUST}'
    )


def _state_dict(state: Any) -> dict[str, _Tensor]:
    if type(state) is not dict:
        raise ValueError(
            f'it holds a {_kind(state)} instead of a dict of tensors; save the state dict with '
            'torch.save(model.state_dict(), path)'
        )
    for name, tensor in state.items():
        if type(name) is not str:
            raise ValueError(f'it holds the key {name!r}, which is not a string; {_TRUST}')
        if type(tensor) is not _Tensor:
            inner = [key for key, value in state.items() if _is_state_dict(value)]
            chosen = f'torch.load(path)[{_short(inner[0])}]' if inner else 'model.state_dict()'
            raise ValueError(
                f'its key {_short(name)} holds a {_kind(tensor)} instead of a tensor, as in a '
                'checkpoint of a whole training run; save the state dict alone with '
                f'torch.save({chosen}, new_path)'
            )
    return state


def _is_state_dict(value: Any) -> bool:
    tensors = type(value) is dict and [type(v) is _Tensor for v in value.values()]
    return bool(tensors) and all(tensors)


def _array(name: str, tensor: _Tensor, records: _Records) -> np.ndarray:
    """The tensor as a read-only view of its storage; every index is checked beforehand."""
    (key, dtype, numel), offset, size, stride = tensor
    entry, label = f'data/{key}', f'tensor {_short(name)}'
    length = records.size(entry)
    if length is None:
        raise ValueError(f'{label} needs the zip entry {entry[:100]!r}, which is missing; {_TRUST}')
    if length != numel * dtype.itemsize:
        raise ValueError(
            f'{label} needs a storage of {numel} {dtype.name} numbers, but the zip entry '
            f'{entry[:100]!r} has {length} bytes; copy the file again'
        )
    if 0 in size:
        # numpy refuses shapes whose product without the zeros overflows.
        if math.prod(max(n, 1) for n in size) >= 2**31:
            raise ValueError(f'{label} is empty but claims the size {size}; {_TRUST}')
        return np.zeros(size, dtype)
    # The stride of an axis of length 1 is never used and can be anything.
    stride = tuple(step if n > 1 else 0 for n, step in zip(size, stride))
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if last >= numel:
        raise ValueError(
            f'{label} (size {size}, stride {stride}, offset {offset}) reaches element {last} of a '
            f'storage of {numel}; {_TRUST}'
        )
    # Steps of 0 could claim an array of any size; torch.save keeps those of an expanded tensor.
    if math.prod(size) > numel:
        raise ValueError(
            f'{label} (size {size}, stride {stride}) has more elements than its storage '
            f'({numel}); save it as tensor.contiguous()'
        )
    storage = np.frombuffer(records.read(entry), dtype)
    return np.lib.stride_tricks.as_strided(
        storage[offset:], size, [step * dtype.itemsize for step in stride], writeable=False
    )
