"""Kinds of sets: what is known of them, and which a result is for."""

import pytest

from tarflow_jax.data import kinds


@pytest.mark.parametrize('manifest, kind', [
    ({'kind': 'photographs', 'image': {'crop': 'edm'}}, 'photographs/edm'),
    ({'kind': 'photographs', 'image': {}}, 'photographs/torchvision'),
    ({'kind': 'imagenet_resized', 'image': {}}, 'imagenet_resized'),
    ({'kind': 'idx', 'image': {'crop': 'torchvision'}}, 'idx'),
    ({'kind': None, 'image': {}}, None),
])
def test_of_manifest(manifest, kind):
    assert kinds.of_manifest(manifest) == kind


# How manifests describe what they hold, of every version.
CUT = 'short side resized to 64 pixels, bilinear and antialiased (Pillow), then the middle 64x64 '
SITE = 'none: the pixels are those of the files, resized by the ImageNet site with a box filter'


@pytest.mark.parametrize('kind, fields', [
    ('photographs', dict(preprocessing=CUT, size=64)),
    ('photographs', dict(preprocessing='the middle square cut out', crop='edm')),
    ('imagenet_resized', dict(preprocessing=SITE, dataset='mine')),
    ('downsampled_imagenet', dict(dataset='downsampled_imagenet/8x8')),
    ('files', dict()),
    ('cifar10', dict(preprocessing='none', classes=kinds.CIFAR10_CLASSES)),
    (None, dict(preprocessing=CUT, classes=kinds.CIFAR10_CLASSES, size=64)),
    ('idx', dict(preprocessing='none', classes=['0', '1'], channels=1)),
    ('idx', dict(preprocessing=CUT, classes=['0', '1'], channels=1, crop='torchvision')),
    ('files', dict(preprocessing='none', classes=['apple', 'bear'])),
    ('samples', dict(preprocessing='none: drawn as samples.json says')),
    (None, dict(preprocessing='in some other way')),
])
def test_of_set(kind, fields):
    fields = dict(
        preprocessing='none: the pixels are those of the files', dataset='x', classes=None,
        size=32, channels=3,
    ) | fields
    image = {name: fields.pop(name) for name in ('size', 'channels', 'crop') if name in fields}
    assert kinds.of_set(fields | {'image': image}) == kind


def test_of_what_is_no_prepared_set():
    assert kinds.of_set({'dataset': 'embedded part of Fashion-MNIST'}) is None


@pytest.mark.parametrize('kind, classes, named', [
    ('idx', ['0', '1', '2'], False), ('files', ['0', '1'], False), ('photographs', None, False),
    ('imagenet_resized', [str(k) for k in range(1, 1001)], False),
    ('photographs', ['0', '1'], True), ('photographs', ['0', '1', '10', '2'], True),
    ('photographs', [str(k) for k in range(12)], False), ('imagenet_resized', ['n2', 'n1'], True),
])
def test_class_names(kind, classes, named):
    found = kinds.class_names({'kind': kind, 'classes': classes})
    assert found == (classes if named else None)


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
    assert 'is for photographs, resized and cropped as torchvision does, but this dataset' in said
    assert "has the ImageNet site's downsampled images" in said
    assert 'as edm does' in kinds.mismatch(('photographs/torchvision',), 'photographs/edm')
    assert 'images of an unknown kind' in kinds.mismatch(('cifar10',), None)
