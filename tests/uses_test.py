"""The modes that use a trained flow: tables of likelihoods, interpolation, completion, GIFs."""

import csv
import shutil

import jax
import numpy as np
import pytest
from command_line import call, flags
from PIL import Image
from tiny_flow import perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax import uses
from tarflow_jax.evaluation import likelihoods
from tarflow_jax.training.corruption import Recipe, corrupt_each


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / 'pictures'
    (path / '3').mkdir(parents=True)
    for name in ('a.png', 'b.png', '3/c.png'):
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(path / name)
    (path / 'notes.txt').write_text('no image')
    return path


def test_likelihoods_of_a_folder(trained, images, folder, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    given = [*flags(workdir, images), '--mode=likelihood', f'--images={folder}']
    assert call(*given) == 0
    printed = capfd.readouterr().err
    assert 'Gaussian noise of standard deviation 0.1, 1 draw(s)' in printed
    assert 'left out: notes.txt is not an image' in printed
    assert f'wrote the log-densities of 3 images to {workdir / "likelihood.csv"}' in printed
    with (workdir / 'likelihood.csv').open() as file:
        rows = list(csv.DictReader(file))
    assert [row['file'] for row in rows] == ['3/c.png', 'a.png', 'b.png']
    assert [row['label'] for row in rows] == ['3', '-1', '-1']
    for row in rows:
        bits = tfj.bits_per_dim(float(row['log_prob']), 256)
        assert float(row['bits_per_dim']) == pytest.approx(float(bits), abs=1e-5)
    assert call(*given, f'--output={tmp_path / "a.txt"}') == 2
    assert 'must end with .csv' in capfd.readouterr().err
    assert call(*given[:-1], f'--images={tmp_path / "nowhere"}') == 2
    assert 'nowhere does not exist' in capfd.readouterr().err


@pytest.mark.parametrize('recipe, words', [
    (Recipe(noise='gaussian', noise_std=0.2), 'Gaussian noise of standard deviation 0.2'),
    (Recipe(noise='uniform'), 'uniform noise of one 8-bit step'),
    (Recipe(noise='levels', noise_std=0.5, lowest_noise_std=0.1), 'deviation 0.1'),
])
def test_images_have_the_noise_of_training(recipe, words):
    model = tiny((1,), noise_conditioned=recipe.noise == 'levels')
    variables, keys = perturbed(model), jax.random.split(jax.random.key(1), 2)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 2), np.uint8)
    batch = {'image': pixels, 'label': np.array([1, -1], np.int32)}
    found = likelihoods.noisy_log_prob(model, recipe, variables, batch, keys)
    level = 0.1 if recipe.noise == 'levels' else None
    noise = Recipe(noise_std=0.1) if level else recipe
    noisy = corrupt_each(keys, pixels, noise).images
    wanted = tfj.log_prob(model, variables, noisy, tfj.Condition(batch['label'], level))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert words in likelihoods.described(recipe)


@pytest.mark.slow
def test_pictures(trained, images, folder, tmp_path, capfd):
    workdir = shutil.copytree(trained, tmp_path / 'run')
    given = flags(workdir, images, sample__count=3)
    assert call(*given, '--mode=interpolate') == 0
    with Image.open(workdir / 'interpolation.png') as picture:
        assert picture.size == (9 * 36 - 4, 6 * 36 - 4)
    output = tmp_path / 'completed.png'
    assert call(
        *given, '--mode=complete', '--known=left', f'--images={folder}', f'--output={output}'
    ) == 0
    assert 'Markov chains, which accepted' in capfd.readouterr().err
    picture = np.asarray(Image.open(output))
    assert picture.shape == (6 * 36 - 4, 3 * 36 - 4)
    # The left half of each row is that of the images.
    for row in range(1, 6):
        np.testing.assert_array_equal(picture[36 * row :][:32, :16], picture[:32, :16])
    gif = tmp_path / 'a.gif'
    assert call(*given, '--mode=sample', f'--gif={gif}') == 0
    with Image.open(gif) as opened:
        assert opened.n_frames > 1
    assert call(*given, '--mode=evaluate', f'--gif={gif}') == 2
    assert 'has no meaning with --mode=evaluate' in capfd.readouterr().err


def test_known_pixels(tmp_path):
    shape = (8, 12, 1)
    for part, count in (('upper', 48), ('lower', 48), ('left', 48), ('right', 48), ('border', 72)):
        assert uses.known_pixels(part, shape).sum() == count
    assert uses.known_pixels('upper', shape)[:4].all()
    assert uses.known_pixels('right', shape)[:, 6:].all()
    mask = np.zeros((8, 12), np.uint8)
    mask[2] = 255
    Image.fromarray(mask).save(tmp_path / 'mask.png')
    np.testing.assert_array_equal(uses.known_pixels(str(tmp_path / 'mask.png'), shape), mask > 0)
    with pytest.raises(ValueError, match='is 8x12 .* but the images are 8x8; resize it'):
        uses.known_pixels(str(tmp_path / 'mask.png'), (8, 8, 1))
    with pytest.raises(ValueError, match='--known=middle is neither one of upper, lower'):
        uses.known_pixels('middle', shape)
