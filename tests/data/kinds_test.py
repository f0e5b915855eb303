"""Kinds of sets: what is known of them, and which a result is for."""

import pytest

from tarflow_jax.data import kinds


@pytest.mark.parametrize('manifest, kind', [
    ({'kind': 'photographs', 'image': {'crop': 'edm'}}, 'photographs/edm'),
    ({'kind': 'photographs', 'image': {}}, 'photographs/torchvision'),
    ({'kind': 'imagenet_resized', 'image': {}}, 'imagenet_resized'),
    ({'kind': None, 'image': {}}, None),
])
def test_of_manifest(manifest, kind):
    assert kinds.of_manifest(manifest) == kind


def test_inferred_from_what_is_no_manifest():
    assert kinds.inferred({}) is None
    assert kinds.inferred({'preprocessing': 'something else', 'image': {'channels': 3}}) is None


@pytest.mark.parametrize('name, kind', [
    ('imagenet_resized/64x64', 'imagenet_resized'), ('cifar10:3.0.2', 'cifar10'), ('mnist', None),
])
def test_of_tfds(name, kind):
    assert kinds.of_tfds(name) == kind


def test_mismatch():
    assert kinds.mismatch((), None) is None
    assert kinds.mismatch(('photographs/torchvision',), 'photographs/torchvision') is None
    assert kinds.mismatch(('imagenet_resized', 'photographs'), 'photographs/adm') is None
    said = kinds.mismatch(('photographs/torchvision',), 'imagenet_resized')
    assert 'is for photographs, resized and cropped as torchvision does, and this set' in said
    assert "holds the ImageNet site's downsampled images" in said
    assert 'as edm does' in kinds.mismatch(('photographs/torchvision',), 'photographs/edm')
    assert 'images of an unknown kind' in kinds.mismatch(('cifar10',), None)
