"""The page docs/simulation_based_inference.md: densities, bounds, and what its checks say."""

import jax.numpy as jnp
import numpy as np
import pytest
from command_line import start
from documented import ROOT, fenced, run_python

PAGE = ROOT / 'docs' / 'simulation_based_inference.md'
SMALL = {
    '10_000': '64', '[1000:]': '[16:]', '[:1000]': '[:16]', 'steps=1500': 'steps=2',
    'batch_size=500': 'batch_size=16', '(1,) * 8': '(1,)', 'width=32, head_dim=32': 'width=8, head_dim=8',
    ', 2000)': ', 20)', '(2000,)': '(20,)', '(5), 300)': '(5), 5)', 'x, 100)': 'x, 4)',
}


@pytest.fixture(scope='module')
def ran():
    return run_python(PAGE, SMALL)


def test_is_short():
    lines = [line for block in fenced(PAGE) for line in block.text.splitlines() if line.strip()]
    assert len(lines) <= 60


@pytest.mark.slow
def test_samples_have_their_density_and_stay_in_the_box(ran):
    samples, density = ran['samples'], ran['density']
    assert samples.shape == (20, 1, 2) and abs(samples).max() < 1
    again = ran['log_prob'](samples[:, 0], jnp.tile(ran['observed'], (20, 1)))
    np.testing.assert_allclose(density[:, 0], again, atol=1e-3)


@pytest.mark.slow
def test_the_exact_posterior_leads_to_the_observation(ran):
    total = ran['exact'].sum(1)
    difference = ran['exact'][:, 1] - ran['exact'][:, 0]
    shift = jnp.stack([-abs(total), difference], 1) / np.sqrt(2)
    u, v = (ran['observed'] - shift - jnp.array([0.25, 0.0])).T
    radius = jnp.hypot(u, v)
    assert abs(radius.mean() - 0.1) < 4 * 0.01 / np.sqrt(20) and (u > 0).all()
    assert 0.02 < (total > 0).mean() < 0.98


@pytest.mark.slow
def test_checks_are_ranks(ran):
    assert ran['ranks'].shape == (5, 2) and ran['coverage'].shape == (5,)
    for ranks in (ran['ranks'], ran['coverage']):
        np.testing.assert_allclose(ranks * 4, np.round(ranks * 4), atol=1e-6)
    np.testing.assert_allclose(ran['theta'].shape, (5, 2))
    assert jnp.isfinite(ran['fitted'].losses).all() and 0 <= ran['c2st'] <= 1


@pytest.mark.slow
def test_it_learns_the_posterior():
    # In a process of its own, whose programs are optimized.
    process = start(program=('-c', LEARNS), cwd=ROOT / 'tests')
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    c2st, covered, held_out = map(float, output.splitlines()[-1].split())
    # Untrained, the loss is about 2.8 nats.
    assert c2st < 0.85 and 0.8 < covered < 0.99 and held_out < -0.5


LEARNS = """
from documented import ROOT, run_python
page = run_python(ROOT / 'docs' / 'simulation_based_inference.md', {'steps=1500': 'steps=250'})
print(page['c2st'], (page['coverage'] < 0.9).mean(), page['fitted'].held_out_losses[-1][1])
"""
