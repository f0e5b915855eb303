"""What a linter and a type checker say, as `pyproject.toml` sets them; where they are installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tarflow_jax

ROOT = Path(tarflow_jax.__file__).parents[1]

# A user's file: types that are wrong here are reported only if the package's own are known.
PROGRAM = """
import jax
import tarflow_jax as tfj

model = tfj.TarFlow(
    image_size=8, image_channels=1, patch_size=2, width=64, layers_per_block=(1, 1)
)
variables = tfj.load_official('model.pth', model)
images: jax.Array = jax.numpy.zeros((2, 8, 8, 1))
nats: jax.Array = tfj.log_prob(model, variables, images)
bits: jax.Array = tfj.bits_per_dim(nats, model.num_dims)
better: jax.Array = tfj.denoise(model, variables, images, noise_std=0.1)
schedule: tfj.Schedule = tfj.calibrate(model, variables, guidance=tfj.Guidance(weight=1.0))
tfj.sample(model, variables, images, method='auto', schedule=schedule)
tfj.save_official(variables, model, 'model.safetensors')

tfj.Guidance(wieght=1.0)
wrong: str = tfj.log_prob(model, variables, images)
"""


def says(tool, *arguments, cwd=ROOT) -> tuple[int, str]:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f'{tool} is not installed')
    ran = subprocess.run(
        [sys.executable, '-m', tool, *arguments], cwd=cwd, capture_output=True, text=True,
        timeout=300, env=os.environ | {'MYPYPATH': str(ROOT)},
    )
    return ran.returncode, ran.stdout + ran.stderr


def test_linter():
    code, output = says('ruff', 'check', '--no-cache', '--output-format=concise')
    assert code == 0, output


def test_type_checker(tmp_path):
    code, output = says('mypy', f'--cache-dir={tmp_path}')
    assert code == 0, output
    (tmp_path / 'program.py').write_text(PROGRAM)
    code, output = says(
        'mypy', f'--cache-dir={tmp_path}', f'--config-file={ROOT}/pyproject.toml', 'program.py',
        cwd=tmp_path,
    )
    first, second = (line for line in output.splitlines() if ': error: ' in line)
    assert 'Unexpected keyword argument "wieght"' in first
    assert 'expression has type "Array", variable has type "str"' in second
