"""A lock for a folder in a bucket, where the system cannot release it when its process ends.

The lock is an object that names its process and is rewritten every few seconds. Each write applies
to one generation of the object only, so only one of two processes succeeds. A lock that has not
been rewritten for a while is stale. A lock of a dead process on this machine is detected at once.
"""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable

from tarflow_jax import paths

BEAT = 5.0  # seconds between writes
STALE = 25.0  # seconds without a write after which the lock is stale
PATIENCE = 10.0  # seconds to try releasing it; then the next process must remove it

_own: set[str] = set()  # tokens of the locks that this process holds

log = logging.getLogger(__name__)


class Held(Exception):
    """Another process holds the lock; the message names it."""


def check(path) -> None:
    """Raises Held if another process holds the lock at a path; removes a stale lock."""
    store, key = _store(path)
    found = store.read(key).result()
    if found.state == 'missing':
        return
    holder, where, token, _ = (*found.value.decode(errors='replace').split('\n'), '', '', '')[:4]
    if token in _own or not _is_left(store, key, found, holder, where):
        raise Held(holder)
    log.warning('removed the stale lock %s of %s', path, holder)
    store.write(key, None, if_equal=found.stamp.generation).result()


def take(path) -> Callable[[], None]:
    """Takes the lock and returns a function that releases it. Raises Held like `check`.

    If another process takes the lock anyway, for example after a network failure, this process ends
    at once, because otherwise both would write.
    """
    check(path)
    store, key = _store(path)
    token = uuid.uuid4().hex
    free = store.read('no such object').result().stamp.generation  # that of a missing object
    generation = _write(store, key, token, 0, free)
    if not generation:
        check(path)
        raise Held('another process')  # it has ended by now
    _own.add(token)
    released = threading.Event()

    def renew():
        nonlocal generation
        beat = 0
        while generation and not released.wait(BEAT):
            beat += 1
            try:
                generation = _write(store, key, token, beat, generation)
            except Exception as error:  # a network error; the next write may succeed
                log.warning('%s could not be written: %s', path, error)
            if not generation:
                holder = store.read(key).result().value.decode(errors='replace')
                log.error('error: %s was taken over by %s; this process ends without writing.',
                          path, holder.partition('\n')[0] or 'another process')
                os._exit(2)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()

    def release():
        released.set()
        thread.join(PATIENCE)
        _own.discard(token)
        with contextlib.suppress(Exception):  # the lock then becomes stale
            if generation:
                store.write(key, None, if_equal=generation).result(PATIENCE)

    return release


def _store(path):
    """Returns the key-value store of the folder, and the key."""
    import tensorstore  # a dependency of Orbax

    bucket, _, name = str(path).removeprefix(paths.BUCKET).partition('/')
    folder, _, key = name.rpartition('/')
    spec = {
        'driver': 'gcs', 'bucket': bucket, 'path': f'{folder}/' if folder else '',
        'context': {'gcs_request_retries': {'max_retries': 5}},
    }
    return tensorstore.KvStore.open(spec).result(), key


def _write(store, key: str, token: str, beat: int, generation: bytes) -> bytes:
    """Overwrites a generation of the lock; returns the next generation, empty on a conflict."""
    holder = f'process {os.getpid()} on {socket.gethostname()}'
    text = f'{holder}\n{_machine()}\n{token}\n{beat}'
    new = store.write(key, text.encode(), if_equal=generation).result().generation
    if not new:
        found = store.read(key).result()
        if token in found.value.decode(errors='replace'):  # written, but the answer was lost
            return found.stamp.generation
    return new


def _is_left(store, key: str, found, holder: str, where: str) -> bool:
    """Returns whether a lock is stale; watches it for as long as necessary."""
    if where == _machine() and not _lives(int(holder.split()[1])):
        return True
    log.info('checking for up to %g s if %s, which holds the lock, still runs', STALE, holder)
    start = time.monotonic()
    while time.monotonic() - start < STALE:
        time.sleep(BEAT / 5)
        now = store.read(key).result()
        if now.stamp.generation != found.stamp.generation:
            return now.state == 'missing'
    return True


def _lives(process: int) -> bool:
    if process == os.getpid():  # an earlier process with the same id
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _machine() -> str:
    """Returns an id shared by processes that see each other's PIDs; host names may be reused."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open('/proc/sys/kernel/random/boot_id') as file:
            known += [file.read().strip()]
        known += [os.readlink('/proc/self/ns/pid')]
    return ' '.join(known)
