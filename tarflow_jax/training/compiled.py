"""The cache of compiled programs in the workdir."""

import os

import jax

from tarflow_jax import paths


def keep_in(workdir) -> None:
    """Caches programs that take a second or more to compile in `<workdir>/compiled`.

    Call it before anything is compiled. JAX_COMPILATION_CACHE_DIR chooses another folder,
    JAX_ENABLE_COMPILATION_CACHE=false disables the cache.
    """
    if workdir and 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = paths.absolute(workdir) / 'compiled'
        jax.config.update('jax_compilation_cache_dir', str(folder))
        if paths.in_bucket(folder):  # XLA cannot write its own GPU caches to a bucket
            jax.config.update('jax_persistent_cache_enable_xla_caches', 'none')
