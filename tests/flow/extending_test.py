"""The page docs/extending.md: it trains, samples follow what is asked for, and its rule does too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import start
from documented import ROOT, fenced, run_python
from tiny_flow import condition_for, noise_for, perturbed, sequence_flow

import tarflow_jax as tfj
from tarflow_jax.flow.affine import Affine
from tarflow_jax.flow.guidance import RULES
from tarflow_jax.training.corruption import NOISES, Recipe, corrupt

PAGE = ROOT / 'docs' / 'extending.md'
SMALL = {
    'range(1500)': 'range(3)', 'layers_per_block=(2,) * 4': 'layers_per_block=(1,)',
    'unroll=2': 'unroll=1', 'patch_size=7': 'patch_size=14',
}


def run(replaced):
    with pytest.MonkeyPatch.context() as patch:  # what it adds to the tables goes again
        for table in (RULES, NOISES):
            for name in ('never_wider', 'laplace'):
                patch.setitem(table, name, None)
        page = run_python(PAGE, replaced)
        return page, RULES['never_wider'], NOISES['laplace']


@pytest.fixture(scope='module')
def ran():
    return run(SMALL)


def test_is_short():
    lines = [line for block in fenced(PAGE) for line in block.text.splitlines()]
    own = [line for line in lines if line.strip() and not line.startswith(('import', 'from'))]
    assert len(own) < 40
    assert 'class ' not in '\n'.join(lines)  # nothing is subclassed


def test_it_trains_and_draws(ran):
    page, _, _ = ran
    assert page['images'].shape == page['narrow'].shape == (16, 28, 28, 1)
    assert int(page['state'].step) == 3 and int(page['metrics']['skipped']) == 0
    for name in ('images', 'narrow', 'log_prob'):
        assert np.isfinite(page[name]).all()
    params = page['state'].params['block_0']
    # What the features go through has a gradient.
    start = page['initial_state'](jax.random.key(0), page['model'], page['optimizer'], ema=True)
    moved = params['feature_embedding']['kernel'] - start.params['block_0']['feature_embedding']['kernel']
    assert abs(moved).min(1).max() > 1e-4


def test_the_rule_of_the_page(ran):
    _, rule, _ = ran
    c, u = (Affine(jnp.array(a), jnp.array(m)) for a, m in (([0.5, -0.2], [1.0, 2.0]), ([0.1, 0.4], [0.8, 2.5])))
    found = rule(2.0, c, u)
    np.testing.assert_allclose(found.log_scale, [0.5, -1.4], rtol=1e-6)
    np.testing.assert_allclose(found.shift, [1.4, 1.0], rtol=1e-6)


def test_a_rule_of_ones_own_in_every_decoder(ran, monkeypatch):
    monkeypatch.setitem(RULES, 'never_wider', ran[1])
    model = sequence_flow(num_features=2, first_token='start')
    variables, condition, noise = perturbed(model, amount=0.15), condition_for(model), noise_for(model)

    def draw(method, rule='never_wider'):
        return tfj.sample(
            model, variables, noise, condition, guidance=tfj.Guidance(1.0, rule=rule),
            method=method, tolerance=1e-6, return_log_prob=True,
        )

    found, log_prob = draw('sequential')
    np.testing.assert_allclose(draw('jacobi')[0], found, atol=1e-4)
    np.testing.assert_allclose(draw('jacobi')[1], log_prob, atol=1e-3)
    assert abs(draw('sequential', 'linear')[0] - found).max() > 1e-2


def test_the_noise_of_the_page(ran, monkeypatch):
    monkeypatch.setitem(NOISES, 'laplace', ran[2])
    pixels = np.full((40, 8, 8, 1), 255, np.uint8)
    images, level, weight = corrupt(jax.random.key(0), pixels, Recipe('laplace', noise_std=0.1))
    noise = np.asarray(images) - 1
    assert abs(np.abs(noise).mean() - 0.1) < 4 * 0.1 / np.sqrt(noise.size)
    assert level is None and weight is None


def test_features_change_the_latents(ran):
    model, features = ran[0]['model'], ran[0]['features']
    variables = perturbed(model)
    images = 0.3 * jax.random.normal(jax.random.key(1), (3, 28, 28, 1))
    given = tfj.log_prob(model, variables, images, tfj.Condition(features=features(jnp.array([0.2, 0.9, 0.5]))))
    none = tfj.log_prob(model, variables, images)
    missing = tfj.log_prob(model, variables, images, tfj.Condition(features=jnp.full((3, 16), jnp.nan)))
    assert abs(given - none).min() > 1e-2
    np.testing.assert_allclose(missing, none, rtol=1e-5)


def test_official_files_have_no_place_for_it(ran, tmp_path):
    model = ran[0]['model']
    with pytest.raises(ValueError, match='feature'):
        tfj.save_official(perturbed(model), model, tmp_path / 'model.safetensors')


@pytest.mark.slow
def test_images_are_as_bright_as_asked_for():
    # In a process of its own, whose programs are optimized: it trains for 1500 steps.
    process = start(program=('-c', BRIGHTNESS), cwd=ROOT / 'tests')
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    assert float(output.splitlines()[-1]) > 0.9


BRIGHTNESS = """
import jax.numpy as jnp
from documented import ROOT, run_python
page = run_python(ROOT / 'docs' / 'extending.md', {})
brightness = (jnp.clip(page['images'], -1, 1).mean((1, 2, 3)) + 1) / 2
print(jnp.corrcoef(page['asked'], brightness)[0, 1])
"""
