"""A lock that allows one writer at a time in a folder."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from tarflow_jax import bucket_lock, paths

FILE = 'lock'

log = logging.getLogger(__name__)


class Taken(OSError):
    """Another process is writing to the folder."""


def check(folder, by_first: Callable = lambda action: action()) -> None:
    """Raises Taken if another process holds the folder; creates nothing. See `held`."""
    path = paths.of(folder) / FILE

    def look():
        if paths.in_bucket(path):
            _of_bucket(bucket_lock.check, path)
        elif path.exists():
            _lock(path).close()

    by_first(look)


@contextlib.contextmanager
def held(folder, by_first: Callable = lambda action: action()) -> Iterator[None]:
    """Locks a folder, which is created if it is missing.

    It locks a file in the folder, which names the process. The system releases the lock when the
    process ends, even after a crash, so a leftover file does not block anyone. For buckets see
    `bucket_lock`.

    Args:
      by_first: `processes.by_first`, if several processes form one run and all call this.
    Raises:
      Taken: if another process holds the lock.
    """
    path = paths.of(folder) / FILE
    release = by_first(lambda: _take(path))
    try:
        yield
    finally:
        if release:
            release()


def _of_bucket(action: Callable, path: Path):
    try:
        return action(path)
    except bucket_lock.Held as holder:
        raise _taken(path, str(holder)) from None


def _taken(path: Path, holder: str) -> Taken:
    return Taken(
        f'{holder or "another process"} is writing to {path.parent}; wait for it, stop it, or '
        'choose another folder.'
    )


def _take(path: Path) -> Callable[[], None]:
    """Takes the lock and returns a function that releases it."""
    if paths.in_bucket(path):
        return _of_bucket(bucket_lock.take, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _lock(path)
    while not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
        file.close()  # the process that held the lock has just removed the file
        file = _lock(path)
    if before := file.read():
        log.warning('took over the stale lock %s of %s', path, before)
    file.truncate(0)
    file.write(f'process {os.getpid()} on {socket.gethostname()}')
    file.flush()

    def release():
        path.unlink(missing_ok=True)
        file.close()

    return release


def _lock(path: Path):
    """Opens and locks the file; raises Taken if another process holds the lock."""
    file = path.open('a+')
    file.seek(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        with file:
            raise _taken(path, file.read()) from None
    except OSError as error:  # a network file system without locks
        log.warning('%s cannot be locked (%s); start only one run in its folder', path, error)
    return file
