"""Files that are there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tarflow_jax import paths


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of `path` once it is complete and on disk.

    The file is written beside `path`, whose folder is created if it is missing. If anything fails,
    the new file is removed and whatever was at `path` stays as it was. A file in a bucket is
    written to the disk first.
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
    # Two processes may write the same file at the same time.
    temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
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
    with replacing(path) as file:
        file.write(text.encode())


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
