"""What the table says of references that were cropped otherwise than the training set."""

import re

import numpy as np
import pytest

from tarflow_jax.evaluation import frechet_score
from tarflow_jax.evaluation.frechet import Statistics

CROPPED = 'photographs/torchvision'
SOURCE = {
    'dataset': 'ILSVRC', 'classes': 1000, 'preprocessing': 'short side resized to 64 pixels, ...',
    'image': {'size': 64, 'channels': 3, 'encoding': 'png'},
}


def statistics(**about):
    return Statistics(9, np.zeros(2), np.eye(2), about)


@pytest.mark.parametrize('about, trained, says', [
    (dict(format='adm'), CROPPED, 'as torchvision does, files of this suite .* as adm does'),
    (dict(format='edm'), CROPPED, 'as edm does'),
    (dict(format='adm'), 'imagenet_resized', 'set has the ImageNet site.* as adm does'),
    (dict(format='tarflow_jax', source=SOURCE), 'photographs/adm', 'the file photographs, .* as torchvision does'),
    (dict(format='tarflow_jax', source=SOURCE), CROPPED, None),
    (dict(format='tarflow_jax', source=SOURCE | {'preprocessing': 'none'}), CROPPED, None),
    (dict(format='adm'), 'photographs/adm', None),
    (dict(format='torchmetrics'), CROPPED, None),
    # These were not cropped, and neither were their references.
    (dict(format='edm'), 'cifar10', None),
    (dict(format='edm'), None, None),
])
def test_caution(about, trained, says):
    given = statistics(**about)
    row = frechet_score._distances('file.npz', given, given, given, trained)
    rows = frechet_score.rows({
        'network': {'name': 'n', 'published_weights': True}, 'is_fid': True, 'samples': 9,
        'samples_from': 'x', 'pixels': 'y', 'distances': [row],
        'neighbours': dict(precision=1, recall=1, density=1, coverage=1, images_of_each=9),
    })
    cautions = [value for name, value in rows if name == 'caution']
    if says is None:
        assert cautions == []
    else:
        [caution] = cautions
        assert re.search(says, caution) and 'the distance includes' in caution


def test_the_training_set_itself_needs_no_caution():
    given = statistics(format='tarflow_jax', source=SOURCE)
    assert 'note' not in frechet_score._distances('train', given, given, given, 'photographs/adm')
