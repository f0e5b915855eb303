"""Reads JSON files with checks of their contents, and seals them with a checksum.

A *shape* describes a valid value: a type (`float` accepts whole numbers, `int` rejects bool), None,
a tuple of alternative shapes, a list with one shape for all items, or a dict. A dict {str: shape}
allows any keys. Any other dict lists the required keys, and optional ones with a ? at the end;
further keys are allowed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

SEAL = 'checksum'  # no content uses this key
_LARGEST = 2**63


class Damaged(ValueError):
    """A file has wrong contents; the message has the reason without path or remedy."""


def read(path: Any, shape: Any = dict) -> Any:
    """Reads a JSON file and returns its contents without the seal.

    Args:
      path: path of the file, or any object with the methods of `pathlib.Path`.
    Raises:
      FileNotFoundError: if the file does not exist.
      Damaged: if it is not JSON in UTF-8, does not have the shape, or has changed since it was
        sealed.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        return parse(path.read_bytes(), shape)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f'it is not a file: {error.strerror}') from None


def parse(text: bytes | str, shape: Any = dict) -> Any:
    """Does the same as `read` with the contents of a file."""
    try:
        if isinstance(text, bytes):
            text = text.decode('utf-8')
        value = json.loads(text, parse_int=_whole)
        if isinstance(value, dict) and SEAL in value:
            seal = value.pop(SEAL)
            if seal != _digest(value):
                raise Damaged('its contents do not match its checksum')
    except RecursionError:
        raise Damaged('it is nested too deeply') from None
    except ValueError as error:  # invalid JSON or UTF-8
        raise error if isinstance(error, Damaged) else Damaged(str(error)[:200]) from None
    check(value, shape)
    return value


def sealed(content: dict) -> dict:
    """Adds a checksum that `read` checks; for files that nobody edits by hand."""
    return content | {SEAL: _digest(content)}


def check(value: Any, shape: Any, place: str = 'it') -> None:
    """Raises Damaged unless a value has the given shape."""
    if isinstance(shape, tuple):
        if not any(_fits(value, option) for option in shape):
            raise Damaged(f'{place} is {_short(value)}')
    elif isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            if key is str:
                for name, item in value.items():
                    check(item, inner, f'{place}[{name[:40]!r}]')
            elif (name := key.removesuffix('?')) in value:
                check(value[name], inner, f'{place}[{name!r}]')
            elif name == key:
                raise Damaged(f'{place} has no {name!r}')
    elif isinstance(shape, list) and isinstance(value, list):
        for i, item in enumerate(value):
            check(item, shape[0], f'{place}[{i}]')
    elif not _is(value, shape):
        raise Damaged(f'{place} is {_short(value)}')


def _is(value: Any, shape: Any) -> bool:
    if shape is None:
        return value is None
    if not isinstance(shape, type):
        return False
    kinds = (int, float) if shape is float else (shape,)
    return isinstance(value, kinds) and not (isinstance(value, bool) and shape is not bool)


def _fits(value: Any, shape: Any) -> bool:
    try:
        check(value, shape)
    except Damaged:
        return False
    return True


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


def _whole(text: str) -> int:
    value = int(text)
    if abs(value) >= _LARGEST:
        raise Damaged(f'it has the number {text[:20]}..., which is too large')
    return value


def _digest(content: dict) -> str:
    text = json.dumps(content, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()
