"""What JAX reads from the environment before it starts, and what Ctrl-C means, for all tests."""

import atexit
import os
import shutil
import signal
import tempfile

DEVICES = '--xla_force_host_platform_device_count=8'

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {DEVICES}'.strip()

# Many tests run the same program: each is compiled once in a session of tests.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = tempfile.mkdtemp(prefix='compiled-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.2'
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

# A shell's background jobs ignore Ctrl-C, and so would the tests that press it.
signal.signal(signal.SIGINT, signal.default_int_handler)
