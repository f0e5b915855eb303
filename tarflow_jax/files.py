"""Files that are there whole or not at all, and places for results, tried before the work."""

import contextlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tarflow_jax import paths

_DAY = 86400  # seconds; no file takes that long to write
_cleaned: set[Path] = set()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of `path` once it is complete and on disk.

    The file is written beside `path`, whose folder is created if it is missing. If anything fails,
    the new file is removed and whatever was at `path` stays as it was. What killed processes left
    in the folder is removed. A file in a bucket is written to the disk first.
    """
    path = paths.of(path)
    if paths.in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / path.name
            with local.open('wb') as file:
                yield file
            paths.upload(local, path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path.parent)
    # Two processes may write the same file at the same time.
    temporary = path.with_name(f'{path.name}.{socket.gethostname()}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in UTF-8; a reader sees the old one or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """As `write_text`."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a folder on the disk that takes the place of `path` once it is complete.

    In a bucket its files appear one by one, in the order in which they were written.
    """
    path = paths.of(path)
    if paths.in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            paths.remove_tree(path)
            for file in sorted(Path(folder).iterdir(), key=lambda file: file.stat().st_mtime_ns):
                paths.upload(file, path / file.name)
        return
    temporary = path.with_name(f'{path.name}.tmp')
    paths.remove_tree(temporary)
    temporary.mkdir(parents=True)
    yield temporary
    paths.remove_tree(path)
    temporary.replace(path)


def _clean(folder: Path) -> None:
    """Removes the files of writers that are gone, before the first file that is written there."""
    if folder in _cleaned:
        return
    _cleaned.add(folder)
    for path in folder.glob('*.tmp'):
        writer = re.fullmatch(r'.+\.(.+)\.(\d{1,9})\.tmp', path.name)
        if writer:
            with contextlib.suppress(OSError):
                here = writer[1] == socket.gethostname()
                if here and _is_gone(int(writer[2])) or time.time() - path.stat().st_mtime > _DAY:
                    path.unlink()


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return process == os.getpid()  # nothing of this one is here yet
