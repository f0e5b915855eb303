"""What `pip install` puts on a machine."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tarflow_jax

ROOT = Path(tarflow_jax.__file__).parents[1]
FILES = ('pyproject.toml', 'setup.cfg', 'README.md', 'LICENSE')
FOLDERS = ('tarflow_jax', 'configs', 'tests', 'launch', 'benchmarks')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('setuptools', minversion='77')
    # Of a copy: setuptools leaves folders beside what it builds.
    source = tmp_path_factory.mktemp('source')
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__', '*.egg-info')
        )
    built = tmp_path_factory.mktemp('built')
    subprocess.run(
        [sys.executable, '-m', 'pip', 'wheel', '--quiet', '--disable-pip-version-check',
         '--no-deps', '--no-build-isolation', f'--wheel-dir={built}', str(source)],
        check=True, timeout=120,
    )
    [path] = built.iterdir()
    assert path.name == f'tarflow_jax-{tarflow_jax.__version__}-py3-none-any.whl'
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_holds_the_package_and_nothing_else(wheel):
    package = ROOT / 'tarflow_jax'
    wanted = {
        str(path.relative_to(ROOT)) for path in package.rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
    }
    assert 'tarflow_jax/py.typed' in wanted
    assert {f'tarflow_jax/data/embedded/{name}' for name in (
        'LICENSE', 'train-images-idx3-ubyte.gz', 'train-labels-idx1-ubyte.gz',
        't10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz',
    )} <= wanted
    info = f'tarflow_jax-{tarflow_jax.__version__}.dist-info/'
    found = {name for name in wheel.namelist() if not name.startswith(info)}
    assert found == wanted
    licences = {name for name in wheel.namelist() if name.startswith(f'{info}licenses/')}
    assert licences == {
        f'{info}licenses/LICENSE', f'{info}licenses/tarflow_jax/data/embedded/LICENSE'
    }


def test_metadata(wheel):
    [name] = [name for name in wheel.namelist() if name.endswith('.dist-info/METADATA')]
    about = email.message_from_bytes(wheel.read(name))
    assert about['Version'] == tarflow_jax.__version__
    assert about['License-Expression'] == 'Apache-2.0'
    assert about['Requires-Python'] == '>=3.11'
    assert set(about.get_all('Provides-Extra')) == {'tpu', 'gpu', 'gcs', 'wandb', 'evaluation', 'test'}
    needs = about.get_all('Requires-Dist')
    assert 'jax[tpu]; extra == "tpu"' in needs
    assert 'jax[cuda13]; extra == "gpu"' in needs
    assert not any(need.startswith('torch') for need in needs)


def test_changes_name_the_version():
    assert f'\n## {tarflow_jax.__version__}\n' in (ROOT / 'CHANGELOG.md').read_text()
