"""Runs of several processes: starting, agreeing, and stopping together."""

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
START_AGAIN = 75  # exit code: stopped by SIGTERM and saved; the same command resumes
DIVERGED = 76  # exit code: the same command would diverge again
HEARTBEAT_SECONDS = 30  # timeout after which a lost process is noticed, and all others end
WAIT_SECONDS = 290  # for the other processes to start; JAX itself gives up after 300

_EXPLICIT = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')

log = logging.getLogger(__name__)


class Alone(RuntimeError):
    """The other processes of the run cannot be reached."""


def start(mode: str = 'auto', wait: float = WAIT_SECONDS) -> None:
    """Joins the other processes of this run, if any. Call it before JAX's backend starts.

    'auto' joins them if the environment tells of more than one process: by the three variables
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (launch/local_processes.sh), as a
    Slurm step, or by GKE's TPU_WORKER_HOSTNAMES. 'on' always joins, and lets JAX find the others;
    on Cloud TPU VMs only the metadata server knows them. 'off' never joins.

    If some have not started after `wait` seconds, this process logs an error and exits with code 1.
    JAX would abort with a C++ stack trace.

    Raises:
      ValueError: if the environment variables contradict each other.
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
        what = '{num_processes} processes at {coordinator_address} (this is process ' \
            '{process_id})'.format(**where)
    else:
        what = 'the other processes of the run'
    # A SIGTERM to any process then stops all of them at the same step; see `Stop`.
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
            f'JAX cannot find {what} ({str(error).rstrip(".")}); set {", ".join(_EXPLICIT)}, or '
            '--distributed=off for one process.'
        ) from error
    except RuntimeError as error:
        reason = str(error).partition('\n')[0].rstrip('.')
        raise Alone(f'{what} cannot be joined: {reason}.') from error
    finally:
        too_late.cancel()


def _checked(given: dict[str, str]) -> tuple[str, int, int]:
    """Returns address, number of processes and index of this one; ValueError if invalid."""
    address, count, index = (given[name] for name in _EXPLICIT)
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(
            f'JAX_COORDINATOR_ADDRESS={address} is invalid; set it to HOST:PORT of process 0, such '
            'as 10.0.0.1:1234.'
        )
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(
            f'JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index} are invalid; set both to whole '
            'numbers, and JAX_PROCESS_ID to at least 0 and below JAX_NUM_PROCESSES.'
        )
    return address, int(count), int(index)


def _check_port(address: str) -> None:
    """Raises Alone if another program uses the port, which would crash JAX."""
    with socket.socket() as ours:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            ours.bind(('', int(address.rpartition(':')[2])))
        except OSError as error:
            raise Alone(
                f'JAX_COORDINATOR_ADDRESS={address}: the port cannot be opened ({error.strerror}); '
                'stop the program that uses it, or choose another port.'
            ) from None


def _give_up(what: str, wait: float) -> None:
    log.error(
        'error: waited %g s for %s, and not all have started; start the others with the same '
        'address, check that they can reach it, or unset %s.', wait, what, ', '.join(_EXPLICIT)
    )
    os._exit(1)


def _several(given: dict) -> bool:
    if given:
        return given['JAX_NUM_PROCESSES'] != '1'
    tasks = os.environ.get('SLURM_STEP_NUM_TASKS', '1') if 'SLURM_JOB_ID' in os.environ else '1'
    return tasks != '1' or ',' in os.environ.get('TPU_WORKER_HOSTNAMES', '')


def from_first(value):
    """Returns the first process's value on every process; all must call it.

    Args:
      value: anything that can be pickled.
    """
    return _from(0, value)


def by_first(action: Callable):
    """Runs an action on the first process only; all processes must call this.

    Returns:
      its result on the first process, None on the others.
    Raises:
      OSError: on every process, if the action raises it.
    """
    result, problem = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except OSError as error:  # raised below: here the others would wait forever
            problem = error
    if problem := from_first(problem):
        raise problem
    return result


def from_any(value):
    """Returns on every process the first value that is not None, in the order of the processes.

    All must call it. Returns None if all values are None.
    """
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
    """Turns Ctrl-C and SIGTERM into a stop after the current step; a context manager.

    An exception within a step could lose the state, as its buffers are donated to the step. So
    the handler only notes the signal. Several processes receive it at different steps, or only one
    does; JAX then agrees on one step for all.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self):
        self._code = None
        self._restore = contextlib.ExitStack()

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            # If Ctrl-C is ignored, as under nohup, it stays ignored.
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
            if number == signal.SIGINT:  # os.write, because a handler may interrupt any other write
                os.write(2, b'\nstopping after this step; Ctrl-C again stops at once, unsaved\n')
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)  # JAX tells the others

        signal.signal(number, note)
        self._restore.callback(signal.signal, number, before)

    def after(self, step: int) -> int | None:
        """Returns the exit code if the run must stop after this step, else None.

        All processes must call it at every step.
        """
        if jax.process_count() == 1:
            return self._code
        if multihost_utils.reached_preemption_sync_point(step):
            return self._code or START_AGAIN
        return None
