"""A checkpoint of the package's first version: the same numbers, and training that goes on.

`tests/first_version` holds a workdir after 4 steps of a tiny flow, and what the first version made
of it: log densities of test images, and samples.
"""

import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import call, flags, metrics

import tarflow_jax as tfj
from tarflow_jax.data import sources
from tarflow_jax.training import sharding
from tarflow_jax.training.checkpoint import Checkpoints

FOLDER = Path(__file__).parents[1] / 'first_version'
EXPECTED = dict(np.load(FOLDER / 'expected.npz'))
MODEL = tfj.TarFlow(
    image_size=28, image_channels=1, patch_size=7, width=8, head_dim=8, layers_per_block=(1, 2),
    num_classes=10,
)
# Of the steps 5 to 8 of the same run under the first version.
LOSSES = [0.3206426799, 0.2715188265, 0.2776504755, 0.2808001637]


@pytest.fixture
def workdir(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / 'run')


def test_flow_is_the_same(workdir):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with Checkpoints(workdir, MODEL) as checkpoints:
        assert checkpoints.latest() == 4
        variables = checkpoints.restore_variables(functools.partial(sharding.placed, mesh=mesh))
    source = sources.load('embedded', 'test')
    images = np.stack([source[i]['image'] for i in range(4)]) * np.float32(2 / 255) - 1
    labels = np.array([source[i]['label'] for i in range(4)], np.int32)
    found = tfj.log_prob(MODEL, variables, images, labels)
    np.testing.assert_allclose(found, EXPECTED['log_prob'], rtol=1e-5)
    samples = tfj.sample(MODEL, variables, EXPECTED['noise'], labels[:2])
    np.testing.assert_allclose(samples, EXPECTED['sample'], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_goes_on(workdir):
    fields = dict(
        model__image_size=28, model__patch_size=7, model__width=8, model__head_dim=8,
        model__layers_per_block='(1,2)', model__num_classes=10, train__epochs=0.0128,
        train__warmup_epochs=0.0016, train__checkpoint_every=4,
    )
    assert call(*flags(workdir, **fields)) == 0
    lines = [line for line in metrics(workdir) if 'loss' in line]
    assert [line['step'] for line in lines] == [5, 6, 7, 8]
    np.testing.assert_allclose([line['loss'] for line in lines], LOSSES, rtol=1e-4)
    assert sorted(path.name for path in (workdir / 'checkpoints').iterdir()) == ['4', '8']


@pytest.mark.parametrize('fields, says', [
    (dict(noise_conditioned=True), 'model.noise_conditioned is False there and True in this'),
    (dict(scale='softplus'), 'model.scale is exp there and softplus in this'),
    (dict(width=16), 'model.width is 8 there and 16 in this'),
])
def test_flow_of_other_fields_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Checkpoints(FOLDER, MODEL.clone(**fields))
