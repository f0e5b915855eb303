"""Rectangular images with features, noise levels and classes, from a folder to the report."""

import contextlib
import csv
import functools
import json
import shutil
from concurrent import futures

import jax
import numpy as np
import pytest
from command_line import call, flags, metrics
from prepared_pictures import picture, run, save

import tarflow_jax as tfj
from tarflow_jax.data import shards, sources
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.checkpoint import Checkpoints

SIZE = (16, 8)
FIELDS = dict(
    model__image_size='(16,8)', model__image_channels=3, model__patch_size=4, model__num_classes=2,
    model__num_features=2, model__noise_conditioned=True, train__noise='levels',
    train__noise_std=0.5, train__lowest_noise_std=0.05, train__epochs=1.5,
    train__warmup_epochs=0.5, sample__count=5, sample__denoise_steps=3, guidance__weight=0.5,
    evaluate__round_trip_images=8, report__rows=2, report__columns=2,
    report__guidance_weights='(1.0,)', report__training_images=8, report__test_images=8,
)
MODEL = tfj.TarFlow(
    image_size=SIZE, image_channels=3, patch_size=4, width=32, head_dim=16, layers_per_block=(1,),
    num_classes=2, num_features=2, noise_conditioned=True,
)


@contextlib.contextmanager
def threads(workers):
    """Workers that start at once."""
    with futures.ThreadPoolExecutor(workers) as pool:
        yield pool


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    """32 images for training and 3 for testing, of two classes, each with two numbers."""
    folder, out = tmp_path_factory.mktemp('pets'), tmp_path_factory.mktemp('prepared') / 'set'
    rng = np.random.default_rng(0)
    with open(folder / 'features.csv', 'w', newline='') as file:
        rows = csv.writer(file)
        rows.writerow(['image', 'age', 'weight'])
        for k in range(35):
            split = 'train' if k < 32 else 'val'
            name = f'{split}/{("cat", "dog")[k % 2]}/{k:02d}.png'
            save(folder / 'pets' / name, picture(k, (*SIZE, 3)))
            rows.writerow([name, *rng.standard_normal(2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, 'worker_processes', threads)
        run(folder / 'pets', out, '--size=16x8', f'--features={folder / "features.csv"}')
    return out


@pytest.fixture(scope='module')
def command(prepared):
    def of(workdir, **fields):
        prepared_set = dict(
            data__source='prepared', data__path=str(prepared), data__test_split='validation'
        )
        return flags(workdir, **FIELDS | prepared_set | fields)

    return of


@pytest.fixture(scope='module')
def trained(command, tmp_path_factory):
    workdir = tmp_path_factory.mktemp('conditioned') / 'run'
    assert call(*command(workdir)) == 0
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / 'run')


def test_training(trained):
    lines = [line for line in metrics(trained) if 'loss' in line]
    assert [line['step'] for line in lines] == [1, 2, 3]
    assert np.isfinite([line['loss'] for line in lines]).all()
    assert all(line['skipped'] == 0 and line['gradient_norm'] > 0 for line in lines)
    # The mean of level times loss: below what the loss of its terms would be.
    assert lines[0]['loss'] < 0.5 * (lines[0]['prior'] - lines[0]['logdet'])
    sheets = {path.name.split('_')[-1] for path in (trained / 'samples').iterdir()}
    assert sheets == {'noise.png', 'raw.png', 'denoised.png', 'guided.png'}


def variables_in(workdir):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with Checkpoints(workdir, MODEL) as checkpoints:
        return checkpoints.restore_variables(functools.partial(sharding.placed, mesh=mesh))


@pytest.mark.slow
def test_samples_have_the_features_of_the_test_set_in_turn(workdir, command, prepared):
    assert call(*command(workdir), '--mode=sample') == 0
    [folder] = (path for path in (workdir / 'samples').iterdir() if path.is_dir())
    arrays = np.load(folder / 'samples.npz')
    np.testing.assert_array_equal(arrays['arr_1'], [0, 1, 0, 1, 0])
    known = json.loads((folder / 'samples.json').read_text())['fingerprint']
    assert known['noise_std'] == 0.5 and len(known['features']) == 16
    levels = known['denoise']['levels']
    np.testing.assert_allclose(levels, [0.5, 0.275, 0.05])

    source = sources.load('prepared', 'validation', path=str(prepared))
    features = np.stack([source[i]['features'] for i in (0, 1, 2, 0, 1)])
    assert np.unique(features).size == 6
    condition = tfj.Condition(arrays['arr_1'].astype(np.int32), np.float32(0.5), features)
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0) for i in range(5)]
    noise = np.stack([jax.random.normal(key, MODEL.token_shape) for key in keys])
    variables = variables_in(workdir)
    images = tfj.sample(MODEL, variables, noise, condition, guidance=tfj.Guidance(weight=0.5))
    images = tfj.iterative_denoise(MODEL, variables, images, condition, levels=levels)
    found = arrays['arr_0'].astype(int)
    assert found.shape == (5, *SIZE, 3)
    assert np.abs(found - pictures.to_pixels(images)).max() <= 1


@pytest.mark.slow
def test_scores(workdir, command):
    fields = dict(evaluate__metrics='("bits_per_dim","classification","levels","round_trip")')
    assert call(*command(workdir, **fields), '--mode=evaluate') == 0
    scores = json.loads((workdir / 'evaluation.json').read_text())['scores']
    bits, classes = scores['bits_per_dim'], scores['classification']
    levels = scores['levels']
    np.testing.assert_allclose(levels['levels'], np.geomspace(0.05, 0.5, 5))
    np.testing.assert_allclose(np.diff(levels['noise_bits_per_dim']), np.log2(10) / 4)
    assert levels['images'] == 3 and (np.diff(levels['bits_per_dim']) > 0).all()
    assert bits['images'] == classes['images'] == 3
    # Random pixels have 8 bits, and the flow is near the identity.
    assert 8.0 < bits['bits_per_dim'] < 9.0
    assert 3 * classes['accuracy'] == pytest.approx(round(3 * classes['accuracy']))
    assert scores['round_trip']['trusted']['float32'] == {'sampling': True, 'likelihood': True}
    assert scores['round_trip']['float32']['image_z_image']['max'] < 1e-4
    assert 'guided_not_finite' in scores['round_trip']['float32']


@pytest.mark.slow
def test_report(workdir, command):
    assert call(*command(workdir), '--mode=report') == 0
    page = (workdir / 'report.html').read_text()
    assert 'then denoised' in page and 'samples, dog' in page
    assert 'photographs, resized and cropped as torchvision does' in page
    assert '2 samples (cat, dog), each at 4 noise levels from 0.5 to 0' in page
    assert '16x8 pixels, 3 channels, patches of 4x4' in page


def renamed(prepared, folder, names):
    """The same images and labels, of classes with other names; its fields."""
    shutil.copytree(prepared, folder)
    manifest = json.loads((folder / 'manifest.json').read_text())
    (folder / 'manifest.json').write_text(json.dumps(manifest | {'classes': names}))
    return [f'--config.data.path={folder}']


def test_classes_in_another_order(workdir, command, prepared, tmp_path, capfd):
    assert Checkpoints(workdir, MODEL).about()['data'] == {
        'class_names': ['cat', 'dog'], 'kind': 'photographs/torchvision',
        'set': "pets, 32 images of split 'train'",
    }
    given = command(workdir, evaluate__metrics='("classification",)')
    assert call(*given, '--mode=evaluate') == 0
    wanted = json.loads((workdir / 'evaluation.json').read_text())
    assert 'least accurate classes' in capfd.readouterr().out
    other = renamed(prepared, tmp_path / 'other', ['dog', 'cat'])
    given = [flag for flag in given if not flag.startswith('--config.data.path')] + other
    assert call(*given, '--mode=evaluate') == 0
    assert 'reordered its class tables' in capfd.readouterr().err
    found = json.loads((workdir / 'evaluation.json').read_text())
    assert found['checkpoint'] == wanted['checkpoint'] | {
        'class_order': 'changed to that of the set'
    }
    accuracy = [r['scores']['classification']['accuracy'] for r in (wanted, found)]
    assert sum(accuracy) == pytest.approx(1)
    # What is trained on goes on with its own classes alone.
    assert call(*given, '--config.train.epochs=2') == 2
    assert 'in another order than the dataset of data.path' in capfd.readouterr().err
    fish = renamed(prepared, tmp_path / 'fish', ['cat', 'fish'])
    assert call(*given[:-1], *fish, '--mode=evaluate') == 2
    assert "('dog' is only in the first, 'fish' only in" in capfd.readouterr().err


def test_a_set_that_the_result_is_not_for(workdir, command, capfd):
    given = command(workdir, data__expects='("imagenet_resized",)',
                    evaluate__metrics='("bits_per_dim",)')
    assert call(*given, '--mode=evaluate') == 0
    printed = capfd.readouterr()
    for text in (printed.err, printed.out):
        assert 'do not compare the two' in text
    data = json.loads((workdir / 'evaluation.json').read_text())['data']
    assert data['kind'] == 'photographs/torchvision' and 'this dataset has' in data['caution']


def test_a_config_without_noise_levels_is_refused(workdir, command, capfd):
    fields = dict(model__noise_conditioned=False, train__noise='gaussian')
    assert call(*command(workdir, **fields), '--mode=sample') == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert 'model.noise_conditioned is True there and False in this config; choose another' in last


def test_other_features_are_refused(workdir, command, capfd):
    assert call(*command(workdir) + ['--config.model.num_features=3'], '--mode=evaluate') == 2
    assert 'features' in capfd.readouterr().err.splitlines()[-1]
