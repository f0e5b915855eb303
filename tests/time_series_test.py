"""The page docs/time_series.md: its bound, its forecasts and their score."""

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import start
from documented import ROOT, fenced, run_python

PAGE = ROOT / 'docs' / 'time_series.md'
SMALL = {
    '20_000': '64', '[2000:]': '[16:]', '[:2000]': '[:16]', 'steps=600': 'steps=2',
    'batch_size=128': 'batch_size=16', 'width=48, head_dim=24': 'width=8, head_dim=8',
    '(3, 3)': '(1, 1)', 'unroll=3': 'unroll=1', ', 2000)': ', 20)', '[:200': '[:4',
}


@pytest.fixture(scope='module')
def ran():
    return run_python(PAGE, SMALL)


def test_is_short():
    lines = [line for block in fenced(PAGE) for line in block.text.splitlines() if line.strip()]
    assert len(lines) <= 60


@pytest.mark.slow
def test_the_bound_is_the_entropy_of_the_noise(ran):
    normal = 0.5 * np.log(2 * np.pi * np.e)
    entropy = 8 * (normal + np.log(3.5)) + 120 * (normal + np.log(0.5))
    assert abs(ran['bound'] + entropy) < 4 * np.sqrt(64 / 20)
    assert ran['nats'] < ran['bound'] - 10  # of a young flow


@pytest.mark.slow
def test_the_model_steps_as_published(ran):
    # x_i' = (x_{i+1} - x_{i-2}) x_{i-1} - x_i + F (Lorenz, 1996), in a small step.
    x = np.arange(8.0) ** 2 % 5
    expected = [(x[(i + 1) % 8] - x[i - 2]) * x[i - 1] - x[i] + 8 for i in range(8)]
    found = (ran['step'](jnp.asarray(x, jnp.float32), 8.0, dt=1e-2) - x) / 1e-2
    np.testing.assert_allclose(found, expected, atol=0.5)


@pytest.mark.slow
def test_the_score_is_that_of_all_pairs(ran):
    members, truth = np.asarray(ran['members']), np.asarray(ran['truth'])
    assert members.shape == (100, 4, 8, 8) and np.isfinite(members).all()
    pairs = sum(abs(members - one) for one in members).sum(0) / (100 * 99)
    expected = (abs(members - truth).mean(0) - 0.5 * pairs).mean((0, 2))
    np.testing.assert_allclose(ran['crps'], expected, rtol=1e-3)


@pytest.mark.slow
def test_it_forecasts():
    process = start(program=('-c', FORECASTS), cwd=ROOT / 'tests')
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    below, coverage, first, last = map(float, output.splitlines()[-1].split())
    # Scores of the true model are 0.28 and 1.09, of the climatology 2.2 and 2.3.
    assert 0 < below < 60 and 0.8 < coverage < 0.95 and first < 0.6 and last < 1.8


FORECASTS = """
from documented import ROOT, run_python
page = run_python(ROOT / 'docs' / 'time_series.md', {'steps=600': 'steps=120', '20_000': '8_000'})
print(page['bound'] - page['nats'], page['coverage'], page['crps'][0], page['crps'][-1])
"""
