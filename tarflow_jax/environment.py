"""Checks environment variables before JAX and XLA read them, and starts the devices."""

import contextlib
import functools
import os
import signal
import sys
import warnings

import jax
import jaxlib.xla_client

SECONDS = 20  # timeout for XLA to read its flags
# Errors that may not recur at another start.
_PASSING = ('already in use', 'UNAVAILABLE', 'ABORTED', 'DEADLINE_EXCEEDED')


class Unavailable(RuntimeError):
    """The devices exist but are not available now."""


def check() -> None:
    """Checks environment variables. Call it before JAX's backend starts.

    Raises:
      ValueError: if one is wrong; the message has the variable, its value and the remedy.
    """
    if jax.config.jax_enable_x64:
        raise ValueError(
            'JAX_ENABLE_X64 is set, but this program computes in float32 and bfloat16; unset it.'
        )
    if os.environ.get('XLA_FLAGS'):
        _check_xla_flags(os.environ['XLA_FLAGS'])


@functools.cache
def _check_xla_flags(given: str) -> None:
    # XLA aborts the process at an unknown flag, so a child process tries them.
    reads, writes = os.pipe()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # JAX warns about forks, but this child computes nothing
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            signal.alarm(SECONDS)
            os.dup2(writes, 2)
            jaxlib.xla_client.CompileOptions()
            os._exit(0)
        os._exit(0)
    os.close(writes)
    with open(reads, errors='replace') as file:
        says = file.readline().strip()
    _, status = os.waitpid(child, 0)
    failed = os.WIFEXITED(status) and os.WEXITSTATUS(status) or os.WIFSIGNALED(status)
    if failed and says:
        reason = says.partition('] ')[2] or says
        raise ValueError(f'XLA_FLAGS={given}: {reason.rstrip(".")}; correct or unset it.')


def start_devices() -> None:
    """Starts JAX's backend.

    Raises:
      ValueError: if JAX_PLATFORMS names a platform that does not exist here.
      Unavailable: if the devices are in use or otherwise not available now.
    """
    try:
        jax.devices()
    except Exception as error:  # also AssertionError, where plugins are missing
        reason = str(error).partition('\n')[0].partition(' (set JAX_PLATFORMS')[0]
        reason = reason.rstrip('.') or type(error).__name__
        wanted = os.environ.get('JAX_PLATFORMS', '')
        if any(word in reason for word in _PASSING):
            raise Unavailable(f'the devices are not available now: {reason}.') from error
        raise ValueError(
            f'JAX_PLATFORMS={wanted}: JAX finds no such device ({reason}); set JAX_PLATFORMS=cpu, '
            'or unset it to use the available devices.'
        ) from error
