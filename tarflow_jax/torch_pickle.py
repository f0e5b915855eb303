"""Interprets the pickle of a torch state dict without unpickling it.

A pickle is a program that `pickle.Unpickler` executes. Even without imports, it can exhaust the
memory (by a memo index of four bytes) or the C stack (by a deeply nested dict key). So the pickle
is never unpickled. `interpret` implements the few opcodes that a state dict needs, in plain Python,
and cannot call or import anything that the file names.
Source: `pickletools`, and the "Serialization semantics" note of the PyTorch documentation.
"""

import pickletools
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

STORAGES = {
    'torch.DoubleStorage': np.dtype('<f8'),
    'torch.FloatStorage': np.dtype('<f4'),
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
_NEW: dict[str, Callable[[], Any]] = {
    'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list, 'EMPTY_DICT': dict,
}
# Opcodes and how many items they pop from the stack; None pops all above the mark.
_COLLECT = {
    'TUPLE': None, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3,
    'APPEND': 1, 'APPENDS': None, 'SETITEM': 2, 'SETITEMS': None,
}

TRUST = (
    'read only files from a source you trust, and save the state dict alone with '
    'torch.save(model.state_dict(), path)'
)


class _Global(NamedTuple):
    name: str


class Storage(NamedTuple):
    key: str
    dtype: np.dtype
    numel: int


class Tensor(NamedTuple):
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _opcodes(data: bytes | BinaryIO) -> Iterator[tuple[str, Any]]:
    try:
        for opcode, argument, _ in pickletools.genops(data):
            yield opcode.name, argument
    except ValueError as error:
        reason = str(error)[:200]
        raise ValueError(f'its pickle is damaged ({reason}); copy the file again') from None


def interpret(data: bytes | BinaryIO) -> Any:
    """Returns the object in the pickle, made of dicts, lists, tuples, scalars and `Tensor`s.

    Args:
      data: the pickle. A stream is read up to the end of the pickle.
    Raises:
      ValueError: if the pickle is damaged or uses more than a state dict needs.
    """
    try:
        return _follow(data)
    except (IndexError, KeyError):
        raise ValueError(f'its pickle is malformed; {TRUST}') from None


def _follow(data: bytes | BinaryIO) -> Any:
    stack: list = []
    below: list[list] = []  # the stacks saved at each mark
    memo: dict[int, Any] = {}
    for name, argument in _opcodes(data):
        if name in _PUSH_ARGUMENT:
            # No torch number exceeds int64; larger numbers would overflow NumPy.
            if type(argument) is int and not -(2**63) <= argument < 2**63:
                raise ValueError(f'its pickle has a number beyond 64 bits; {TRUST}')
            stack.append(argument)
        elif name in _NEW:
            stack.append(_NEW[name]())
        elif name in ('BINPUT', 'LONG_BINPUT'):
            memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(memo[argument])
        elif name == 'MARK':
            below.append(stack)
            stack = []
        elif name in _COLLECT:
            count = _COLLECT[name]
            if count is None:
                items, stack = stack, below.pop()
            else:
                items = [stack.pop() for _ in range(count)][::-1]
            if name.startswith('TUPLE'):
                stack.append(tuple(items))
            else:
                _add(stack[-1], items, name)
        elif name == 'GLOBAL':
            stack.append(_global(argument.replace(' ', '.')))
        elif name == 'BINPERSID':
            stack.append(_storage(stack.pop()))
        elif name == 'REDUCE':
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif name == 'BUILD':
            # Attributes of the OrderedDict (version numbers of torch) are not needed.
            stack.pop()
            if type(stack[-1]) is not dict:
                raise ValueError(f'its pickle sets attributes of a {_kind(stack[-1])}; {TRUST}')
        elif name == 'STOP':
            return stack.pop()
        elif name != 'PROTO':
            raise ValueError(
                f'its pickle uses {name}, which no state dict of the default pickle protocol '
                f'(2) needs; {TRUST}'
            )
    raise IndexError


def _kind(value: Any) -> str:
    return 'tensor' if type(value) is Tensor else type(value).__name__.strip('_')


def _add(target: Any, items: list, opcode: str) -> None:
    """Implements APPEND(S) and SETITEM(S)."""
    if opcode.startswith('APPEND'):
        if type(target) is not list:
            raise ValueError(f'its pickle appends to a {_kind(target)}; {TRUST}')
        target.extend(items)
        return
    if type(target) is not dict or len(items) % 2:
        raise ValueError(f'its pickle sets items of a {_kind(target)}; {TRUST}')
    for key, value in zip(items[::2], items[1::2]):
        # Other keys are rejected: hashing a nested tuple recurses on the C stack without limit.
        if type(key) not in (str, int):
            raise ValueError(f'its pickle has a dict key of type {_kind(key)}; {TRUST}')
        if key in target:
            raise ValueError(f'its pickle sets the dict key {short(key)} twice; {TRUST}')
        target[key] = value


def short(key: str | int) -> str:
    return repr(key if isinstance(key, int) or len(key) <= 100 else key[:97] + '...')


def _global(name: str) -> _Global:
    if name in STORAGES or name in (_ORDERED_DICT, _TENSOR, _PARAMETER):
        return _Global(name)
    raise ValueError(
        f'its pickle names {short(name)}, which no state dict needs and which was not executed; '
        f'{TRUST}'
    )


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _storage(reference: Any) -> Storage:
    match reference:
        # The last item, a view into the storage, exists only before PyTorch 1.6 and is unused.
        case (
            ('storage', _Global(name), str(key), str(), int(numel))
            | ('storage', _Global(name), str(key), str(), int(numel), None)
        ):
            if name in STORAGES and _is_size(numel):
                return Storage(key, STORAGES[name], numel)
    raise ValueError(f'its pickle has a malformed reference to a storage; {TRUST}')


def _reduce(function: Any, arguments: Any) -> Any:
    """Evaluates the few functions that a state dict calls, recognised by name."""
    match function, arguments:
        case _Global(name), () if name == _ORDERED_DICT:
            return {}
        case _Global(name), (Tensor() as tensor, bool(), _) if name == _PARAMETER:
            return tensor
        case _Global(name), (Storage() as s, offset, tuple(size), tuple(stride), _, _, *flags):
            # Flags, such as a pending negation, change the numbers; none is supported.
            plain = name == _TENSOR and not any(flags)
            numbers = all(_is_size(n) for n in (offset, *size, *stride))
            if plain and numbers and len(size) == len(stride) <= 32:
                return Tensor(s, offset, size, stride)
    called = function.name if type(function) is _Global else f'a {_kind(function)}'
    raise ValueError(
        f'its pickle calls {called} with arguments that torch.save does not write; {TRUST}'
    )


def state_dict(state: Any) -> dict[str, Tensor]:
    """Returns the state if it is a dict of tensors with string keys; else raises ValueError."""
    if type(state) is not dict:
        raise ValueError(
            f'it is of type {_kind(state)} instead of a dict of tensors; save the state dict with '
            'torch.save(model.state_dict(), path)'
        )
    for name, tensor in state.items():
        if type(name) is not str:
            raise ValueError(f'it has the key {name!r}, which is not a string; {TRUST}')
        if type(tensor) is not Tensor:
            inner = [key for key, value in state.items() if _is_state_dict(value)]
            chosen = f'torch.load(path)[{short(inner[0])}]' if inner else 'model.state_dict()'
            raise ValueError(
                f'its key {short(name)} is of type {_kind(tensor)} instead of a tensor, as in a '
                'checkpoint of a whole training run; save only the state dict with '
                f'torch.save({chosen}, new_path)'
            )
    return state


def _is_state_dict(value: Any) -> bool:
    return type(value) is dict and bool(value) and all(type(v) is Tensor for v in value.values())
