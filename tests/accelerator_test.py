"""benchmarks/accelerator.sh: its parts, on a CPU and tiny, and what it prints of them."""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest

from tarflow_jax import config as configs

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / 'benchmarks' / 'accelerator.sh'
SHELLCHECK = shutil.which('shellcheck', path=str(Path(sys.executable).parent)) or shutil.which('shellcheck')


def run(*flags):
    # Without conftest's eight devices, which the small batches could not be split over.
    environment = {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
    return subprocess.run(
        [SCRIPT, f'--python={sys.executable}', *flags], capture_output=True, text=True, timeout=900,
        env=environment,
    )


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    import comparison

    return comparison


def test_the_flow_that_is_timed_is_the_config_s(benchmarks):
    source = {}
    exec((ROOT / 'configs' / 'imagenet64.py').read_text(), source)
    model = configs.plan(source['get_config']('cond')).model
    timed = benchmarks.our_model('imagenet64', 'gpu')
    same = {name: getattr(model, name) for name in ('dtype', 'remat')}
    assert timed.clone(**same) == model


def test_use_of_a_card(benchmarks):
    assert benchmarks.utilisation(494.5e12, 'NVIDIA H100 80GB HBM3') == 0.5
    assert benchmarks.utilisation(378e12, 'NVIDIA H100 PCIe') == 0.5
    assert benchmarks.utilisation(1e12, 'NVIDIA GeForce') is None
    assert benchmarks.utilisation(1e12, None) is None


class Step:
    """A train step in place of a real one: 10 bytes of state, and memory for each image."""

    limit, tried = 100, []

    def __init__(self, batch, each=1.0):
        Step.tried.append(batch)
        self.state_bytes, self.bytes, self.batch = 10, 20 + each * batch, batch

    def __call__(self):
        if self.bytes > Step.limit:
            raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')


@pytest.mark.parametrize('make, tried, batch', [
    (lambda n: Step(n, 1.0), [8, 64], 64),  # 80 bytes are left for images
    (lambda n: Step(n, 1.0 if n < 64 else 1.5), [8, 64, 32], 32),
    (lambda n: Step(n, 20.0), [8, 4], 4),
])
def test_the_largest_batch_that_fits(benchmarks, monkeypatch, make, tried, batch):
    import train_step

    Step.tried = []
    device = types.SimpleNamespace(memory_stats=lambda: {'bytes_limit': Step.limit})
    monkeypatch.setattr(train_step.jax, 'devices', lambda: [device])
    found, size = train_step.our_step_that_fits(make, 8)
    assert size == found.batch == batch and Step.tried == tried


@pytest.mark.skipif(not SHELLCHECK, reason='shellcheck is not installed')
def test_shellcheck_finds_nothing():
    found = subprocess.run(
        [SHELLCHECK, '--external-sources', SCRIPT], capture_output=True, text=True, cwd=ROOT / 'launch'
    )
    assert found.returncode == 0, found.stdout


def test_what_it_would_run():
    ran = run('--dry_run', '--official=CHECKOUT')
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 9 and all(line.startswith('timeout ') for line in lines)
    assert all('--device=gpu' in line for line in lines)
    assert sum('--official=CHECKOUT' in line for line in lines) == 4
    fetched = run('wheels', '--wheels=DIR', '--dry_run')
    assert 'pip download' in fetched.stdout and fetched.stdout.split()[-1] == 'packaging'


@pytest.mark.parametrize('flags, named', [
    (['--minutes=soon'], '--minutes=soon'), (['fast'], 'fast is neither'), (['wheels'], '--wheels'),
])
def test_bad_flags(flags, named):
    ran = run(*flags)
    assert ran.returncode == 2 and named in ran.stderr and len(ran.stderr.splitlines()) == 1


@pytest.mark.slow
def test_all_of_it_tiny(tmp_path):
    ran = run('--tiny', '--minutes=14', f'--out={tmp_path / "results"}')
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert ran.returncode == 0 and not [row for row in rows if 'failed' in row], ran.stderr[-2000:]
    assert ran.stdout == (tmp_path / 'results').read_text()
    kinds = [row['what'] for row in rows]
    assert kinds == ['train_step', 'attention', 'parity', *['sampling'] * 2, 'likelihood', *['sampling'] * 2]
    train, attention, parity, one, guided, likelihood, jacobi, automatic = rows
    assert train['side'] == 'ours' and train['images_per_second'] > 0
    assert max(attention['xla']['gradient_errors']) < 0.03
    assert max(attention['whole_head_interpreted']['gradient_errors']) < 0.03
    assert parity['within_tolerance'] and len(parity['errors']) == 12
    assert (one['guidance'], guided['guidance']) == (0.0, 2.3)
    assert (jacobi['method'], automatic['method']) == ('jacobi', 'auto') and automatic['schedule']
    assert likelihood['images_per_second'] > 0
