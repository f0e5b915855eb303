"""The page docs/boltzmann_generators.md: its target has the symmetries and densities that it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documented import ROOT, fenced, run_python

PAGE = ROOT / 'docs' / 'boltzmann_generators.md'
# In place of the page's numbers; tests/docs_test.py has the same.
SMALL = {
    'width=32, head_dim=16, layers_per_block=(1,) * 8': 'width=8, head_dim=4, layers_per_block=(1,)',
    'steps=4000': 'steps=3', '[-2000]': '[-40]', '(5000,': '(64,', 'y[:1000]': 'y[:32]',
    'steps=50,': 'steps=2,',
}


@pytest.fixture(scope='module')
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp('boltzmann')
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal((320, 4, 2)).astype(np.float32)
    np.save(folder / 'dw4.npy', x - x.mean(1, keepdims=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_python(PAGE, SMALL)


def test_is_short():
    lines = [line for block in fenced(PAGE) if block.language == 'python' for line in block.text.splitlines()]
    assert len([line for line in lines if line.strip()]) <= 60


@pytest.mark.slow
def test_it_runs(page):
    assert page['y'].shape == (64, 4, 2) and page['moved'].samples.shape == (32, 4, 2)
    assert np.isfinite(page['log_weights']).all() and np.isfinite(page['fitted'].losses).all()
    assert np.isfinite(page['reweighted']).all() and np.isfinite(page['annealed']).all()


@pytest.mark.slow
def test_augmented_data_has_the_chosen_place_orientation_and_numbering(page):
    x = jnp.asarray(np.concatenate([page['train']] * 4))
    y, _ = page['augment'](jax.random.key(5), x)
    back = page['positions'](y)
    to = page['to']
    energies = [page['energy'](to.inverse(a)[0]) for a in (x, back)]
    np.testing.assert_allclose(*energies, rtol=2e-4)
    centre, angle = back.mean(1), page['principal_angle'](back)
    assert abs(centre.std() - 0.5) < 0.03 and abs(centre.mean()) < 0.05
    assert abs(angle.std() - 0.15) < 0.01
    assert (jnp.diff(back[..., 0], axis=1) > 0).all()
    # Neither reflections nor half turns prefer a side.
    assert abs(jnp.sign(back[:, 0, 1] - centre[:, 1]).mean()) < 0.15


@pytest.mark.slow
def test_the_target_is_the_energy_with_gaussians_of_place_and_angle(page):
    to, log_target = page['to'], page['log_target']
    x = jnp.asarray(page['train'][:16])
    y, _ = page['augment'](jax.random.key(6), x)

    def expected(y):
        positions = page['positions'](y)
        place, angle = positions.mean(1), page['principal_angle'](positions)
        jacobian = jax.vmap(jax.jacobian(lambda y: page['positions'](y[None])[0]))(y)
        _, log_determinant = jnp.linalg.slogdet(jacobian.reshape(-1, 8, 8))
        gaussians = -2 * jnp.square(place).sum(1) - 0.5 * jnp.square(angle / 0.15)
        return -page['energy'](to.inverse(x)[0]) + gaussians + log_determinant

    np.testing.assert_allclose(log_target(y), expected(y), rtol=1e-4, atol=2e-3)
    # Moved as a whole, a configuration changes by the Gaussian of its place alone.
    moved = y.at[:, 0, 0].add(0.3).at[..., 1].add(-0.2)
    before, after = (jnp.square(page['positions'](a).mean(1)).sum(1) for a in (y, moved))
    np.testing.assert_allclose(log_target(moved) - log_target(y), 2 * (before - after), atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize('system', ['dw4', 'lj13'])
def test_the_benchmark_has_the_target_of_the_page(page, system):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'benchmarks'))
        import boltzmann

    chosen = boltzmann.SYSTEMS[system]
    N, D = chosen.particles, chosen.dimensions
    frame = boltzmann.Frame(chosen, page['to'].scale.item())
    if system == 'dw4':
        y, _ = page['augment'](jax.random.key(7), jnp.asarray(page['train'][:16]))
        np.testing.assert_allclose(
            frame.log_target(y), page['log_target'](y), rtol=1e-4, atol=2e-3
        )
    grid = jnp.stack(jnp.meshgrid(*[1.1 * jnp.arange(3.0)] * D), -1).reshape(1, -1, D)[:, :N]
    x = (grid - grid.mean(1)) / frame.scale
    for ordered in (True, False):
        frame = boltzmann.Frame(chosen, frame.scale, ordered)
        y, _ = frame.augment(jax.random.key(8), jnp.repeat(x, 4, 0))
        np.testing.assert_allclose(
            chosen.energy(frame.positions(y)[0]), chosen.energy(grid).repeat(4), rtol=1e-3, atol=1e-2
        )


def test_energies_of_pairs():
    """bgflow's constants: minima of the double well, and of Lennard-Jones, by hand."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / 'benchmarks'))
        import boltzmann

    def pair(distance):
        return jnp.array([[[0.0, 0.0], [distance, 0.0]]])

    minimum = 4 + np.sqrt(4 / 1.8)
    assert float(boltzmann.double_well(pair(minimum))[0]) == pytest.approx(-40 / 9, rel=1e-5)
    assert float(boltzmann.double_well(pair(4.0))[0]) == pytest.approx(0, abs=1e-5)
    # -1 at distance 1, and the trap: two particles half of 1 from their centre.
    assert float(boltzmann.lennard_jones(pair(1.0))[0]) == pytest.approx(-1 + 0.25, rel=1e-5)
