"""Files that are there whole or not at all, and places for results, tried before the work."""

import contextlib
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

# What a run keeps in its workdir.
FOLDERS = ('checkpoints', 'compiled', 'samples', 'schedules', 'statistics', 'tensorboard')
FILES = ('metrics.jsonl', 'evaluation.json', 'report.html', 'outliers.png')

_DAY = 86400  # seconds; no file takes that long to write
_cleaned: set[Path] = set()


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a binary file that takes the place of `path` once it is complete and on disk.

    The file is written beside `path`, whose folder is created if it is missing. If anything fails,
    the new file is removed and whatever was at `path` stays as it was. What killed processes left
    in the folder is removed.
    """
    path = Path(path)
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


def try_folder(folder, what: str) -> None:
    """Makes a folder and a file in it, and removes what it has made.

    Args:
      what: the flag or field that names the folder, for the error.

    Raises:
      ValueError: if it cannot be written to.
    """
    folder, made = Path(folder), []
    whole = folder.absolute()
    missing = [p for p in (whole, *whole.parents) if not os.path.exists(p)]
    there = missing[-1].parent if missing else folder
    try:
        if not there.is_dir():
            raise NotADirectoryError(None, f'{there} is not a folder')
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(None, f'{there} cannot be written to')
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process was faster
                path.mkdir()
                made.append(path)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = (getattr(error, 'strerror', None) or str(error)).rstrip('.')
        raise ValueError(
            f'{what}={folder} cannot be written to ({reason}); choose another folder.'
        ) from None
    finally:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # another process has put something there
                path.rmdir()


def try_file(file, what: str) -> None:
    """The same of a file that is to be written, into a folder that exists."""
    file = Path(file)
    if not file.absolute().parent.is_dir():
        raise ValueError(f'{what}={file}: its folder does not exist; create it first.')
    if file.is_dir():
        raise ValueError(f'{what}={file} is a folder; give the name of a file.')
    try_folder(file.parent, what)


def check_workdir(workdir) -> None:
    """ValueError if a workdir cannot be written to, or something else has a name it needs."""
    try_folder(workdir, '--workdir')
    for names, wrong, kind in ((FOLDERS, Path.is_file, 'folder'), (FILES, Path.is_dir, 'file')):
        for path in (Path(workdir) / name for name in names):
            if wrong(path):
                raise ValueError(
                    f'{path} is no {kind}, and the run needs a {kind} of this name; move it away.'
                )


def check_size(folder, size: int, what: str) -> None:
    """ValueError if so many bytes are more than the whole file system of a folder holds."""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    total = shutil.disk_usage(there).total
    if size > total:
        raise ValueError(
            f'{what} need {size / 1e9:,.0f} GB, and the file system of {there} has '
            f'{total / 1e9:,.0f} GB; choose fewer.'
        )
