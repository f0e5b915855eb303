"""Zips and folders as dataset_tool.py of StyleGAN and EDM writes them."""

import json
import zipfile

import numpy as np
import pytest
from prepared_pictures import elements, encoded, last_error, manifest, picture, run

pytestmark = pytest.mark.usefixtures('in_threads')

COUNT = 12


def name_of(k):
    return f'{k // 5:05d}/img{k:08d}.png'


def write(path, labels):
    """As dataset_tool.py does: stored, and dataset.json last; no file of labels for `...`."""
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_STORED) as archive:
        for k in range(COUNT):
            archive.writestr(name_of(k), encoded(picture(k)))
        if labels is not ...:
            labels = labels and [[name_of(k), label] for k, label in enumerate(labels)]
            archive.writestr('dataset.json', json.dumps({'labels': labels}))
            archive.writestr('LICENSE.txt', 'free')
    return path


LABELS = [(7 * k) % 4 for k in range(COUNT)]


@pytest.mark.parametrize('as_folder', [False, True])
@pytest.mark.parametrize('labels', [LABELS, None, ...])
def test_sets_of_the_tool(tmp_path, labels, as_folder):
    source = write(tmp_path / 'pets-8x8.zip', labels)
    if as_folder:
        zipfile.ZipFile(source).extractall(tmp_path / 'pets-8x8')
        source = tmp_path / 'pets-8x8'
    run(source, tmp_path / 'out', '--split=train')
    images, got = elements(tmp_path / 'out', 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in range(COUNT)])
    made = manifest(tmp_path / 'out')
    assert got == (LABELS if labels is LABELS else [-1] * COUNT)
    assert made['classes'] == (list('0123') if labels is LABELS else None)
    assert made['image'] == {'size': 8, 'channels': 3, 'encoding': 'png'}
    assert made['preprocessing'] == 'none: the pixels are those of the files'
    assert made['splits']['train']['notes']['count'] == 0


def test_another_size_and_a_part_for_the_test(tmp_path, capfd):
    source = write(tmp_path / 'pets.zip', LABELS)
    run(source, tmp_path / 'none', code=2)
    assert 'such as --split=train, or split off a test set with --test_fraction=0.1' in last_error(capfd)
    run(source, tmp_path / 'out', '--size=4', '--crop=edm', '--test_fraction=0.3')
    made = manifest(tmp_path / 'out')
    assert made['image']['crop'] == 'edm' and made['image']['size'] == 4
    assert sum(len(elements(tmp_path / 'out', split)[1]) for split in ('train', 'test')) == COUNT


@pytest.mark.parametrize('labels, says', [
    ([0.5] * COUNT, 'the label 0.5 in dataset.json, which is not a'),
    ([[0, 1]] * COUNT, 'the label [0, 1] in dataset.json, which is not a'),
    ([0] * (COUNT - 1), 'gives 00002/img00000011.png the label None'),
    ([-1] * COUNT, 'the label -1'),
    ([2**40] * COUNT, 'which is not a whole number, 0 or more'),
])
def test_labels_that_are_refused(tmp_path, labels, says, capfd):
    run(write(tmp_path / 'pets.zip', labels), tmp_path / 'out', '--split=train', code=2)
    assert says in last_error(capfd)


@pytest.mark.parametrize('text', ['{"labels": [', '[' * 10**5, '\xff'])
def test_a_damaged_index(tmp_path, text, capfd):
    source = write(tmp_path / 'pets.zip', ...)
    with zipfile.ZipFile(source, 'a') as archive:
        archive.writestr('dataset.json', text.encode('latin1'))
    run(source, tmp_path / 'out', '--split=train', code=2)
    assert f'{source} has a damaged dataset.json' in last_error(capfd)
