"""Variables of the environment that JAX or XLA would stumble over."""

import os
import subprocess
import sys

import jax
import pytest
from command_line import QUICKSTART, ROOT, call, start

from tarflow_jax import environment, main

CHECK = """
from tarflow_jax import environment
try:
    environment.check()
except ValueError as error:
    print(error)
"""


def asks(monkeypatch, problem):
    def devices():
        raise problem

    monkeypatch.setattr(jax, 'devices', devices)
    environment.start_devices()


@pytest.mark.parametrize('problem, says', [
    (RuntimeError("Unable to initialize backend 'tpu': NOT_FOUND: no device. (set JAX_PLATFORMS=''"),
     "finds no such device (Unable to initialize backend 'tpu': NOT_FOUND: no device)"),
    (AssertionError(), 'finds no such device (AssertionError)'),
])
def test_devices_that_are_not_there(monkeypatch, problem, says):
    monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
    with pytest.raises(ValueError) as error:
        asks(monkeypatch, problem)
    assert str(error.value).startswith('JAX_PLATFORMS=tpu: JAX ') and says in str(error.value)
    assert str(error.value).endswith('set JAX_PLATFORMS=cpu, or unset it to use the available devices.')


def test_devices_that_are_taken(monkeypatch, capfd, tmp_path):
    taken = RuntimeError('ABORTED: The TPU is already in use by process with pid 7.')
    with pytest.raises(environment.Unavailable, match='is already in use by process with pid 7.$'):
        asks(monkeypatch, taken)
    # Another start may find them free: not the exit code of bad input.
    monkeypatch.setattr(main.sharding, 'use_cores_as_devices', lambda _: None)
    assert call(QUICKSTART, f'--workdir={tmp_path}', '--mode=sample') == 1
    assert 'error: the devices are not available now' in capfd.readouterr().err


@pytest.mark.parametrize('flags, says', [
    ('--nonsense', 'XLA_FLAGS=--nonsense: Unknown flag in XLA_FLAGS: --nonsense; correct or unset it.'),
    ('--xla_force_host_platform_device_count=abc', "Couldn't interpret value abc for flag"),
])
def test_flags_of_xla(flags, says):
    # In a process where XLA has not read its flags yet.
    ran = subprocess.run(
        [sys.executable, '-c', CHECK], env=os.environ | {'XLA_FLAGS': flags, 'PYTHONPATH': str(ROOT)},
        capture_output=True, text=True, timeout=60,
    )
    assert says in ran.stdout and ran.stdout.count('\n') == 1


def test_doubles(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(environment, 'jax', type('jax', (), {
        'config': type('config', (), {'jax_enable_x64': True})
    }))
    for mode in ('train', 'report', 'convert'):
        assert call(QUICKSTART, f'--workdir={tmp_path}', f'--mode={mode}') == 2
        [line] = capfd.readouterr().err.splitlines()
        assert line.endswith('JAX_ENABLE_X64 is set, but this program computes in float32 and bfloat16; unset it.')


@pytest.mark.slow
def test_variables_that_jax_refuses_when_it_is_imported(tmp_path, monkeypatch):
    monkeypatch.setenv('JAX_ENABLE_X64', 'maybe')
    process = start(QUICKSTART, f'--workdir={tmp_path}')
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and said.count('\n') == 1
    assert said.startswith("error: invalid truth value 'maybe' for environment 'JAX_ENABLE_X64';")
