"""Pictures: where each pixel goes, and the files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_flow import tiny
from tiny_plan import plan_of
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.training import pictures, sharding

MODEL = tiny((1,))
KEY = jax.random.key(0)


def test_to_pixels():
    values = np.arange(256)
    np.testing.assert_array_equal(pictures.to_pixels(values / 127.5 - 1), values)
    x = jnp.array([-9.0, -1.0, -0.997, -0.994, 0.0, 0.001, 0.999, 1.0, 2.0, jnp.inf, -jnp.inf, jnp.nan])
    wanted = [0, 0, 0, 1, 128, 128, 255, 255, 255, 255, 0, 128]
    found = pictures.to_pixels(x)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, wanted)


def test_grid():
    pixels = np.arange(5 * 2 * 3 * 1, dtype=np.uint8).reshape(5, 2, 3, 1)
    sheet = pictures.grid(pixels, columns=3)
    assert sheet.shape == (2 + 2 + 2, 3 * 3 + 2 * 2, 1) and sheet.dtype == np.uint8
    for i in range(5):
        y, x = 4 * (i // 3), 5 * (i % 3)
        np.testing.assert_array_equal(sheet[y : y + 2, x : x + 3], pixels[i])
        sheet[y : y + 2, x : x + 3] = 255
    assert (sheet == 255).all()


def test_captions():
    pixels = np.random.default_rng(0).integers(0, 255, (6, 30, 40, 3)).astype(np.uint8)
    names = ['cat', 'dog', 'a name that is much too long']
    head, row = pictures.CAPTION, 60 + 4
    # The rows have the same classes: one line of names above the columns.
    sheet = pictures.grid(pixels, 3, scale=2, captions=names * 2)
    assert sheet.shape == (head + 2 * row - 4, 3 * 84 - 4, 3)
    for i in range(6):
        y, x = head + row * (i // 3), 84 * (i % 3)
        found = sheet[y : y + 60, x : x + 80]
        np.testing.assert_array_equal(found, pixels[i].repeat(2, 0).repeat(2, 1))
    line = sheet[:head]
    assert all((line[:, x : x + 80] < 128).any() for x in (0, 84, 168))
    assert (line[:, [*range(80, 84), *range(164, 168)]] == 255).all()
    # Else each picture has its own.
    sheet = pictures.grid(pixels, 3, captions=[*names, *names[::-1]])
    assert sheet.shape == (2 * (head + 32) - 2, 3 * 42 - 2, 3)
    np.testing.assert_array_equal(sheet[-30:, -40:], pixels[5])
    np.testing.assert_array_equal(sheet[-30 - head : -30, -40:], sheet[:head, :40])


@pytest.mark.parametrize('channels', [1, 3])
def test_save_png(tmp_path, channels):
    picture = np.random.default_rng(0).integers(0, 256, (3, 4, channels), np.uint8)
    path = tmp_path / 'deep' / 'in' / 'sheet.png'
    pictures.save_png(path, picture)
    pictures.save_png(path, picture[::-1])
    found = np.asarray(Image.open(path))
    assert found.shape == ((3, 4) if channels == 1 else (3, 4, 3))
    np.testing.assert_array_equal(found.reshape(3, 4, channels), picture[::-1])
    assert [p.name for p in path.parent.iterdir()] == ['sheet.png']


def test_save_png_replaces_whole_files_only(tmp_path, monkeypatch):
    path = tmp_path / 'sheet.png'
    pictures.save_png(path, np.zeros((2, 2, 1), np.uint8))
    before = path.read_bytes()

    def half(self, file, format):
        file.write(b'half')
        raise OSError('no room')

    monkeypatch.setattr(Image.Image, 'save', half)
    with pytest.raises(OSError, match='no room'):
        pictures.save_png(path, np.ones((2, 2, 1), np.uint8))
    assert path.read_bytes() == before


def test_draw_is_the_sampler_and_the_denoiser():
    count = 5  # drawn by 8 devices
    variables = random_variables(MODEL)
    labels = np.arange(count, dtype=np.int32) % 3
    mesh = sharding.make_mesh()
    images = pictures.draw(plan_of(MODEL, strength=0.5), variables, KEY, count, mesh=mesh)
    shape = (count, 8, 8, 2)
    assert {name: image.shape for name, image in images.items()} == {
        'noise': shape, 'raw': shape, 'denoised': shape, 'redraws': (count,)
    }
    noise = jax.random.normal(KEY, (8, 16, 8))[:count]
    raw = tfj.sample(MODEL, variables, noise, labels)
    denoised = tfj.denoise(MODEL, variables, raw, labels, noise_std=0.1, strength=0.5)
    np.testing.assert_allclose(images['raw'], raw, atol=1e-4)
    np.testing.assert_allclose(images['denoised'], denoised, atol=1e-4)
    assert np.abs(images['denoised'] - images['raw']).max() > 1e-3
    assert not np.asarray(images['redraws']).any()


def test_pictures_of_a_flow_with_every_condition():
    model = tiny((1,), num_features=2, noise_conditioned=True, image_size=(8, 4))
    variables = random_variables(model)
    features = np.random.default_rng(0).standard_normal((3, 2)).astype(np.float32)
    plan = plan_of(model, noise='levels', noise_std=0.3, features=features, label=1)
    images = pictures.draw(plan, variables, KEY, 5, mesh=sharding.make_mesh())
    assert images['denoised'].shape == (5, 8, 4, 2)
    condition = tfj.Condition(np.full(5, 1, np.int32), np.float32(0.3), features[[0, 1, 2, 0, 1]])
    noise = jax.random.normal(KEY, (8, 8, 8))[:5]
    raw = tfj.sample(model, variables, noise, condition)
    np.testing.assert_allclose(images['raw'], raw, atol=1e-4)
    clean = tfj.iterative_denoise(
        model, variables, raw, condition, levels=plan.denoising.levels
    )
    np.testing.assert_allclose(images['denoised'], clean, atol=1e-4)


def test_sheets():
    def names(noise_std=0.1, strength=1.0, **guidance):
        plan = plan_of(MODEL, noise_std=noise_std, strength=strength, **guidance)
        found, redraws = pictures.sheets(
            plan, random_variables(MODEL), KEY, 8, sharding.make_mesh(), columns=4
        )
        assert redraws == 0
        assert all(sheet.shape == (36, 76, 2) for sheet in found.values())
        return found

    guided = names(weight=1.0)
    assert list(guided) == ['noise', 'raw', 'denoised', 'guided']
    assert (guided['guided'] != guided['denoised']).any()
    assert (guided['raw'] != guided['noise']).any()
    assert list(names(noise_std=0.0)) == ['noise', 'raw']
    assert list(names(strength=0.0)) == ['noise', 'raw']


def test_sheets_name_the_classes():
    plan = plan_of(MODEL, noise_std=0.0)
    named = dataclasses.replace(plan.conditions, class_names=['cat', 'dog', 'wild'])
    assert named.captions([4, 5]) == ['dog', 'wild'] and named.name(0) == 'cat'
    assert plan.conditions.captions([4]) is None and plan.conditions.name(1) == 'class 1'
    found, _ = pictures.sheets(
        dataclasses.replace(plan, conditions=named), random_variables(MODEL), KEY, 6,
        sharding.make_mesh(), columns=3,
    )
    assert found['raw'].shape == (36 + pictures.CAPTION, 56, 2)
