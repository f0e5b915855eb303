"""The lock of a folder in a bucket, where the system cannot end it with its process.

It is an object that names its process and is written again every few seconds. Each write is for
one generation of the object alone, so of two processes only one succeeds. A lock that is not
written for a while was left behind; one of a dead process of this machine is known at once.
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
STALE = 25.0  # seconds without one after which the lock counts as left behind
PATIENCE = 10.0  # seconds for giving it back, which may be left to the next process

_own: set[str] = set()  # tokens of the locks that this process holds

log = logging.getLogger(__name__)


class Held(Exception):
    """Another process holds the lock; the message names it."""


def check(path) -> None:
    """Raises Held if another process holds the lock at a path; removes one that was left behind."""
    store, key = _store(path)
    found = store.read(key).result()
    if found.state == 'missing':
        return
    holder, where, token, _ = (*found.value.decode(errors='replace').split('\n'), '', '', '')[:4]
    if token in _own or not _is_left(store, key, found, holder, where):
        raise Held(holder)
    log.warning('%s was left by a process that is gone: %s', path, holder)
    store.write(key, None, if_equal=found.stamp.generation).result()


def take(path) -> Callable[[], None]:
    """Takes the lock; returns what releases it. Raises Held, as `check` does.

    Should another process take the lock all the same, as after a network failure, this process
    ends at once: both would write.
    """
    check(path)
    store, key = _store(path)
    token = uuid.uuid4().hex
    free = store.read('no such object').result().stamp.generation  # that of what is not there
    generation = _write(store, key, token, 0, free)
    if not generation:
        check(path)
        raise Held('another process')  # which has ended by now
    _own.add(token)
    released = threading.Event()

    def renew():
        nonlocal generation
        beat = 0
        while generation and not released.wait(BEAT):
            beat += 1
            try:
                generation = _write(store, key, token, beat, generation)
            except Exception as error:  # the network; the next one may succeed
                log.warning('%s could not be written: %s', path, error)
            if not generation:
                holder = store.read(key).result().value.decode(errors='replace')
                log.error('error: %s was taken over by %s; this process ends, and writes no more.',
                          path, holder.partition('\n')[0] or 'another process')
                os._exit(2)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()

    def release():
        released.set()
        thread.join(PATIENCE)
        _own.discard(token)
        with contextlib.suppress(Exception):  # left behind, then
            if generation:
                store.write(key, None, if_equal=generation).result(PATIENCE)

    return release


def _store(path):
    """The key-value store of the folder, and the key."""
    import tensorstore  # which Orbax brings along

    bucket, _, name = str(path).removeprefix(paths.BUCKET).partition('/')
    folder, _, key = name.rpartition('/')
    spec = {
        'driver': 'gcs', 'bucket': bucket, 'path': f'{folder}/' if folder else '',
        'context': {'gcs_request_retries': {'max_retries': 5}},
    }
    return tensorstore.KvStore.open(spec).result(), key


def _write(store, key: str, token: str, beat: int, generation: bytes) -> bytes:
    """Writes the lock over a generation; returns the next one, empty if another was there."""
    holder = f'process {os.getpid()} on {socket.gethostname()}'
    text = f'{holder}\n{_machine()}\n{token}\n{beat}'
    new = store.write(key, text.encode(), if_equal=generation).result().generation
    if not new:
        found = store.read(key).result()
        if token in found.value.decode(errors='replace'):  # written; the answer was lost
            return found.stamp.generation
    return new


def _is_left(store, key: str, found, holder: str, where: str) -> bool:
    """Whether the process that wrote a lock is gone; watches for as long as it takes to know."""
    if where == _machine() and not _lives(int(holder.split()[1])):
        return True
    log.info('looking for up to %g s whether %s, which holds the lock, still runs', STALE, holder)
    start = time.monotonic()
    while time.monotonic() - start < STALE:
        time.sleep(BEAT / 5)
        now = store.read(key).result()
        if now.stamp.generation != found.stamp.generation:
            return now.state == 'missing'
    return True


def _lives(process: int) -> bool:
    if process == os.getpid():  # of an earlier start: it is not among the own ones
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _machine() -> str:
    """What only processes share that see each other's numbers; host names are used again."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        with open('/proc/sys/kernel/random/boot_id') as file:
            known += [file.read().strip()]
        known += [os.readlink('/proc/self/ns/pid')]
    return ' '.join(known)
