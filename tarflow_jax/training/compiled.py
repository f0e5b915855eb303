"""The cache of compiled programs in the workdir, and what it saves."""

import contextlib
import logging
import os

import jax

from tarflow_jax import paths

log = logging.getLogger(__name__)

_SAVED = '/jax/compilation_cache/compile_time_saved_sec'


def keep_in(workdir) -> None:
    """Has programs that take a second to compile kept in `<workdir>/compiled`.

    To be called before anything is compiled. JAX_COMPILATION_CACHE_DIR names another folder,
    JAX_ENABLE_COMPILATION_CACHE=false keeps nothing.
    """
    if workdir and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = paths.absolute(workdir) / 'compiled'
        jax.config.update('jax_compilation_cache_dir', str(folder))
        if paths.in_bucket(folder):  # XLA, which keeps files of its own for GPUs, reaches none
            jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')


@contextlib.contextmanager
def savings():
    """Says how much compiling was saved by programs of earlier runs: at once where it is much, and
    in the end in total."""
    seconds = []

    def listen(event: str, duration: float, **_):
        if event != _SAVED:
            return
        seconds.append(duration)
        if duration > 5:
            log.info('a program of an earlier run was reused, which saved %.1f s', duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        if seconds:
            log.info('%d programs of earlier runs were reused, which saved %.1f s of compiling',
                     len(seconds), sum(seconds))
