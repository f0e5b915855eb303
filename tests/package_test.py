"""What the package loads, and which of its rooms knows which."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tarflow_jax

PACKAGE = Path(tarflow_jax.__file__).parent
MODULES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob('*.py'))
HEAVY = ('tensorflow', 'torch', 'grain', 'tensorflow_datasets', 'orbax', 'tensorboardX', 'PIL',
         'plotly')

# Packages beside the standard library and numpy; rooms of this package.
ROOMS = {
    'flow': ({'jax', 'flax'}, set()),
    'sampling': ({'jax'}, {'flow', 'files', 'json_files', 'paths'}),
    'data': (
        {'absl', 'array_record', 'etils', 'grain', 'PIL', 'pyarrow', 'tensorflow_datasets', 'tqdm'},
        {'__version__', 'files', 'json_files', 'paths', 'lock'},
    ),
    'training': (
        {'jax', 'optax', 'orbax', 'tensorboardX', 'PIL', 'tqdm', 'wandb'},
        {'flow', 'sampling', 'data', 'config', 'files', 'json_files', 'paths', 'lock'},
    ),
    'evaluation': (
        {'jax', 'flax', 'PIL', 'plotly', 'tqdm'},
        {'flow', 'sampling', 'data', 'training', 'config', 'files', 'json_files', 'paths', 'lock',
         'torch_file', 'torch_writer', 'wrong_files'},
    ),
    'ahead_of_time': (
        {'jax', 'libtpu', 'optax'},
        {'flow', 'sampling', 'data', 'training', 'evaluation', 'config', 'files'},
    ),
}


def imports(path) -> set[str]:
    """Full names of all that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path} has a relative import'
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return found


@pytest.mark.parametrize('module', [name for name in MODULES if os.sep in name])
def test_rooms_import_only_to_their_left(module):
    room = module.split(os.sep)[0]
    packages, rooms = ROOMS[room]
    for name in imports(PACKAGE / module):
        top, *rest = name.split('.')
        if top == 'tarflow_jax':
            # Without a rest it is for __version__.
            assert not rest or rest[0] in rooms | {room}, f'{module} imports {name}'
        else:
            allowed = packages | {'numpy'} | sys.stdlib_module_names
            assert top in allowed, f'{module} imports {name}'


def test_config_knows_nothing_of_the_loop():
    # The loop takes its types; what the config makes objects of must not lead back to the loop.
    inside = {name for name in imports(PACKAGE / 'config.py') if name.startswith('tarflow_jax.')}
    rooms = {'.'.join(name.split('.')[1:3]) for name in inside}
    assert rooms <= {
        'config_ranges', 'data.kinds', 'data.pipeline', 'data.sources', 'flow.attention', 'flow.condition',
        'flow.denoising', 'flow.flow', 'flow.guidance', 'flow.products', 'sampling.generate',
        'training.corruption', 'training.optimizer',
    }


def test_conversion_needs_no_training():
    for module in ('convert.py', 'torch_file.py', 'torch_pickle.py'):
        for name in imports(PACKAGE / module):
            if name.startswith('tarflow_jax.'):
                assert name.startswith((
                    'tarflow_jax.flow.flow.', 'tarflow_jax.files', 'tarflow_jax.json_files',
                    'tarflow_jax.paths', 'tarflow_jax.torch_file', 'tarflow_jax.torch_pickle.',
                    'tarflow_jax.wrong_files',
                ))


IMPORT = f"""
import sys
import tarflow_jax
print([name for name in {HEAVY} if name in sys.modules])
print([name for name in tarflow_jax.__all__ if not callable(getattr(tarflow_jax, name))])
"""


def test_import_is_light():
    environment = {**os.environ, 'PYTHONPATH': str(PACKAGE.parent)}
    ran = subprocess.run(
        [sys.executable, '-c', IMPORT], env=environment, capture_output=True, text=True,
        timeout=60, check=True,
    )
    assert ran.stdout.splitlines() == ['[]', '[]']


def test_public_names():
    assert set(tarflow_jax.__all__) >= {
        'TarFlow', 'Guidance', 'log_prob', 'bits_per_dim', 'sample', 'denoise', 'load_official',
        'save_official',
    }
    assert tarflow_jax.__version__.count('.') == 2
