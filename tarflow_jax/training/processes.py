"""Many processes as one run: starting, stopping together, and what the exit codes mean."""

import contextlib
import logging
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

MODES = ('auto', 'on', 'off')
START_AGAIN = 75  # exit code: stopped by SIGTERM and saved; the same command goes on from there
DIVERGED = 76  # exit code: starting again would only diverge again
# A worker that is gone is noticed, and all others end, after so many seconds.
HEARTBEAT_SECONDS = 30
WAIT_SECONDS = 290  # for the others to start; JAX itself gives up after 300

_EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')


log = logging.getLogger(__name__)


class Alone(RuntimeError):
    """The other processes of a run cannot be reached."""


def start(mode: str = 'auto', wait: float = WAIT_SECONDS) -> None:
    """Joins the other processes of this run, if there are any. Call before JAX's backend starts.

    With 'auto', where the environment speaks of more than one process: the three variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/local_processes.sh), a
    Slurm step, or GKE's TPU_WORKER_HOSTNAMES. With 'on' always, and JAX finds out about the others
    (on Cloud TPU VMs only the metadata server knows them).

    If they have not all started after `wait` seconds, this process says so and ends with exit code
    1: JAX would end it with a stack of C++.

    Raises:
      ValueError: if the environment contradicts itself.
      Alone: if the others cannot be reached.
    """
    given = {name: os.environ[name] for name in _EXPLICIT if os.environ.get(name)}
    explicit = len(given) == len(_EXPLICIT)
    if given and not explicit and mode != 'off':
        missing = ', '.join(name for name in _EXPLICIT if name not in given)
        raise ValueError(f'{", ".join(given)} is set and {missing} is not; set all three or none.')
    if mode == 'off' or (mode == 'auto' and not _several(given if explicit else {})):
        return
    where = {}
    if explicit:
        where = dict(zip(
            ('coordinator_address', 'num_processes', 'process_id'), _checked(given)
        ))
        if where['process_id'] == 0:
            _check_port(where['coordinator_address'])
        where['cluster_detection_method'] = 'deactivate'
        what = '{num_processes} processes, this one number {process_id}, ' \
            'at the coordinator {coordinator_address}'.format(**where)
    else:
        what = 'the other processes of the run, of which the environment speaks'
    # With it a SIGTERM to any process makes all stop at the same step; see `Stop`.
    jax.config.update('jax_enable_preemption_service', True)
    log.info('waiting for %s, up to %g s', what, wait)
    too_late = threading.Timer(wait, _give_up, (what, wait))
    too_late.daemon = True
    too_late.start()
    try:
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
            **where,
        )
    except ValueError as error:
        raise ValueError(
            f'JAX does not find {what} ({str(error).rstrip(".")}); set {", ".join(_EXPLICIT)}, or '
            '--distributed=off for one process.'
        ) from error
    except RuntimeError as error:
        reason = str(error).partition('\n')[0].rstrip('.')
        raise Alone(f'{what} cannot be joined: {reason}.') from error
    finally:
        too_late.cancel()


def _checked(given: dict[str, str]) -> tuple[str, int, int]:
    """Address, number of processes and index of this one; ValueError if they cannot be."""
    address, count, index = (given[name] for name in _EXPLICIT)
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f'JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT of process 0, such as '
            '10.0.0.1:1234.'
        )
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f'JAX_NUM_PROCESSES {count!r} and JAX_PROCESS_ID {index!r} must be numbers, the second '
            'from 0 up and below the first.'
        )
    return address, int(count), int(index)


def _check_port(address: str) -> None:
    """Raises Alone if another program has the port: JAX would crash."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind(('', int(address.rpartition(':')[2])))
        except OSError as error:
            raise Alone(
                f'JAX_COORDINATOR_ADDRESS={address}: its port cannot be had ({error.strerror}); '
                'end the program that has it, or choose another port.'
            ) from None


def _give_up(what: str, wait: float) -> None:
    log.error(
        'error: not all are there after %g s of waiting for %s; start the others with the same '
        'address, see that it can be reached, or unset %s.', wait, what, ', '.join(_EXPLICIT)
    )
    os._exit(1)


def _several(given: dict) -> bool:
    if given:
        return given['JAX_NUM_PROCESSES'] != '1'
    tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1') if 'SLURM_JOB_ID' in os.environ else '1'
    return tasks != '1' or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')


def from_first(value):
    """The first process's value, anything that can be pickled, on every process; all call this."""
    return _from(0, value)


def by_first(action: Callable):
    """What the action returns on the first process, else None; its OSError on every process."""
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except OSError as error:  # not raised here, where the others would wait for ever
            problem = error
    if problem := from_first(problem):
        raise problem
    return result


def from_any(value):
    """The value that is not None of the first process that has one, on every process, or None."""
    if jax.process_count() == 1:
        return value
    there = multihost_utils.process_allgather(np.bool_(value is not None))
    return _from(int(np.argmax(there)), value)


def _from(index: int, value):
    if jax.process_count() == 1:
        return value
    its = jax.process_index() == index
    data = np.frombuffer(pickle.dumps(value), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size), its))
    data = multihost_utils.broadcast_one_to_all(np.resize(data, size), its)
    return pickle.loads(np.asarray(data).astype(np.uint8).tobytes())


class Stop:
    """Whether, and with which exit code, a run is to stop: asked between steps, a context manager.

    Ctrl-C or SIGTERM inside of a step could lose the state: its buffers are given to the step
    before the step returns the next ones. So they are only noted. Of several processes each gets
    the signal at another step, or only one does: JAX agrees on one step for all.

    A second Ctrl-C raises at once.
    """

    def __init__(self):
        self._code = None
        self._restore = contextlib.ExitStack()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            # A Ctrl-C that is ignored, under nohup and the like, stays so.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._handle(signal.SIGINT, 130)
            if jax.process_count() == 1 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                self._handle(signal.SIGTERM, START_AGAIN)
        return self

    def __exit__(self, *_):
        self._restore.close()

    def _handle(self, number, code: int) -> None:
        before = signal.getsignal(number)

        def note(*_):
            self._code = code
            signal.signal(number, before)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others

        signal.signal(number, note)
        self._restore.callback(signal.signal, number, before)

    def after(self, step: int) -> int | None:
        """The exit code if the run is to stop after this step; all processes ask at every step."""
        if jax.process_count() == 1:
            return self._code
        if multihost_utils.reached_preemption_sync_point(step):
            return self._code or START_AGAIN
        return None
