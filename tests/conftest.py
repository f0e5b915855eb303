"""What JAX reads from the environment before it starts, what Ctrl-C means, and runs to look at."""

import atexit
import os
import re
import shutil
import signal
import tempfile

import pytest

DEVICES = '--xla_force_host_platform_device_count=8'
# Most of a test's time is compiling: code that is not optimized costs a quarter less in all.
# Commands that tests start are compiled as users' are.
UNOPTIMIZED = '--xla_backend_optimization_level=0'

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Every worker has a core; threads of BLAS beside it would wait for theirs by spinning.
os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
for flag in (DEVICES, UNOPTIMIZED):
    if flag.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
        os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flag}'.strip()

# Many tests run the same program: each is compiled once in a session of tests, by whichever of
# pytest-xdist's workers comes first; they inherit the folder.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    folder = tempfile.mkdtemp(prefix='compiled-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = folder
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

# A shell's background jobs ignore Ctrl-C, and so would the tests that press it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# After the above: these start JAX.
import bucket_emulator  # noqa: E402
import jax  # noqa: E402
from command_line import COND_GRAY, OFFICIAL, call, flags, write_images  # noqa: E402


@pytest.fixture(scope='module', autouse=True)
def forget_compiled_programs():
    """Else they pile up to as many memory maps as Linux allows a process, and it crashes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope='session')
def emulator():
    """Buckets on this machine, for this process and those that it starts."""
    with bucket_emulator.running() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket_emulator.environment(url).items():
            patch.setenv(name, value)
        yield url


@pytest.fixture
def bucket(emulator, request):
    """A folder in a bucket, for one test."""
    return f'gs://{bucket_emulator.BUCKET}/{re.sub("[^a-z0-9_]", "-", request.node.nodeid)}'


@pytest.fixture(scope='session')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='session')
def trained(images, tmp_path_factory):
    """A workdir with checkpoints at steps 9 and 12. Tests that write take a copy."""
    workdir = tmp_path_factory.mktemp('trained')
    assert call(*flags(workdir, images)) == 0
    return workdir


@pytest.fixture(scope='session')
def converted(images, tmp_path_factory):
    """A workdir made from an official checkpoint."""
    workdir = tmp_path_factory.mktemp('converted')
    code = call(*flags(workdir, images, **COND_GRAY), '--mode=convert', f'--input={OFFICIAL}')
    assert code == 0
    return workdir
