"""A run of the command line becomes a flow and its parameters in Python."""

import jax
import numpy as np
import pytest
from command_line import saved

import tarflow_jax as tfj


def test_load(trained):
    model, variables = tfj.load(str(trained))
    assert (model.width, model.num_classes, model.image_shape) == (32, 5, (16, 16, 1))
    there = saved(trained, 12)
    leaves = jax.tree.leaves_with_path(variables['params'])
    assert len(leaves) > 10
    for path, leaf in leaves:  # the averaged ones
        assert leaf.devices() == {jax.local_devices()[0]}
        assert there["weights['ema_params']" + jax.tree_util.keystr(path)] == np.asarray(leaf).tobytes()
    images = tfj.sample_images(model, variables, jax.random.key(0), 2, labels=1, denoise=0.1)
    assert images.shape == (2, 16, 16, 1) and np.isfinite(images).all()


def test_load_of_a_step(trained):
    _, variables = tfj.load(trained, step=9)
    path, leaf = jax.tree.leaves_with_path(variables['params'])[0]
    name = "weights['ema_params']" + jax.tree_util.keystr(path)
    assert saved(trained, 9)[name] == np.asarray(leaf).tobytes() != saved(trained, 12)[name]


def test_load_of_a_step_that_is_not_there(trained):
    with pytest.raises(FileNotFoundError, match='no checkpoint at step 10; there are 9, 12.'):
        tfj.load(trained, step=10)
    with pytest.raises(FileNotFoundError, match='no best checkpoint, as none was validated; choose'):
        tfj.load(trained, step='best')


def test_load_config(trained):
    config = tfj.load_config(str(trained))
    assert (config.train.batch_size, config.train.noise_std) == (16, 0.1)


@pytest.mark.parametrize('function', [tfj.load, tfj.load_config])
def test_no_run(tmp_path, function):
    with pytest.raises(FileNotFoundError, match=f'{tmp_path} has no checkpoint with a config'):
        function(tmp_path)
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='file is a file, not a folder; pass a folder.'):
        function(tmp_path / 'file')
