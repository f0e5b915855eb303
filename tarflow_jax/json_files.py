"""JSON files, checked before they are believed, and sealed with a checksum of what they hold.

A *shape* says what a value must be: a type (`float` takes whole numbers, `int` no bool), None, a
tuple of shapes of which one must fit, a list of one shape for every item, or a dict. A dict
{str: shape} has any keys; any other names the keys that must be there, those that may be missing
with a ? at their end, and says nothing of further ones.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

SEAL = 'checksum'  # a name that no content has
_LARGEST = 2**63


class Damaged(ValueError):
    """A file holds something else than it should; the text says what, not where nor the remedy."""


def read(path: Any, shape: Any = dict) -> Any:
    """What a JSON file holds, without its seal if it has one.

    Args:
      path: of the file; what has the methods of `pathlib.Path` may be anywhere.
    Raises:
      FileNotFoundError: if there is none.
      Damaged: if it is no JSON in UTF-8, its content does not have the shape, or is another one
        than when it was sealed.
    """
    path = Path(path) if isinstance(path, str) else path
    try:
        return parse(path.read_bytes(), shape)
    except (IsADirectoryError, NotADirectoryError) as error:
        raise Damaged(f'it is no file: {error.strerror}') from None


def parse(text: bytes | str, shape: Any = dict) -> Any:
    """As `read`, from the content of a file."""
    try:
        if isinstance(text, bytes):
            text = text.decode('utf-8')
        value = json.loads(text, parse_int=_whole)
        if isinstance(value, dict) and SEAL in value:
            seal = value.pop(SEAL)
            if seal != _digest(value):
                raise Damaged('its content does not have the checksum that it says')
    except RecursionError:
        raise Damaged('it is nested too deeply') from None
    except ValueError as error:  # of json, and what is not UTF-8
        raise error if isinstance(error, Damaged) else Damaged(str(error)[:200]) from None
    check(value, shape)
    return value


def sealed(content: dict) -> dict:
    """The content with its own checksum, which `read` compares; not for a hand to edit."""
    return content | {SEAL: _digest(content)}


def check(value: Any, shape: Any, place: str = 'it') -> None:
    """Raises Damaged if a value does not have a shape."""
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
        raise Damaged(f'it holds the number {text[:20]}..., which is too large')
    return value


def _digest(content: dict) -> str:
    text = json.dumps(content, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()
