"""Writes files and folders atomically."""

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
    """Opens a binary file that replaces `path` once it is complete and flushed to disk.

    The file is written next to `path`; a missing folder is created. On failure, the new file is
    removed and `path` stays unchanged. Files that killed processes left in the folder are removed.
    For a bucket, the file is written to disk first.
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
    # The process id keeps two writers of the same file apart.
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
    """Writes a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a binary file atomically."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a folder on disk that replaces `path` once it is complete.

    In a bucket, its files appear one by one, in the order in which they were written.
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
    """Removes files of writers that no longer run, before the first write to a folder."""
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
    return process == os.getpid()  # this process has not written here yet
