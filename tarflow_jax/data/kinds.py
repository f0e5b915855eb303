"""Kinds of image datasets; scores on two different kinds cannot be compared.

A kind is a word, such as 'imagenet_resized'. For photographs, the crop rule follows:
'photographs/torchvision'.
"""

from collections.abc import Sequence
from typing import Any

PHOTOGRAPHS = 'photographs'
BOX_RESIZED = 'imagenet_resized'
DOWNSAMPLED = 'downsampled_imagenet'
CIFAR10 = 'cifar10'
IDX = 'idx'
FILES = 'files'
EMBEDDED = 'embedded'
SAMPLES = 'samples'
NAMES = {
    PHOTOGRAPHS: 'photographs, resized and cropped',
    BOX_RESIZED: "the ImageNet site's downsampled images (squashed by a box filter, not cropped)",
    DOWNSAMPLED: 'the older downsampled ImageNet (van den Oord et al.)',
    CIFAR10: 'CIFAR-10',
    IDX: 'IDX files',
    FILES: 'unchanged image files',
    EMBEDDED: 'the embedded images',
    SAMPLES: 'samples of a flow',
}
# Their labels are numbers in the files, so they are the same for everyone.
NUMBERED = (IDX, CIFAR10, EMBEDDED)
CIFAR10_CLASSES = [
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck',
]
_TFDS = (BOX_RESIZED, DOWNSAMPLED, CIFAR10)


def of_set(manifest: dict[str, Any]) -> str | None:
    """Returns the kind of a prepared dataset without its crop rule; None if it is unknown.

    Args:
        manifest: describes how the images were made; it may lack the kind.
    """
    how, image = manifest.get('preprocessing', ''), manifest.get('image', {})
    if manifest.get('classes') == CIFAR10_CLASSES:
        return CIFAR10 if image['size'] == 32 else None
    if how.startswith('none: drawn'):
        return SAMPLES
    if how.startswith('none: the pixels are those of the files'):
        if 'ImageNet site' in how:
            return BOX_RESIZED
        return DOWNSAMPLED if manifest['dataset'].startswith(DOWNSAMPLED) else FILES
    if how == 'none':
        return IDX if manifest['classes'] == _numbers(manifest) else FILES
    if how.startswith(('short side resized', 'resized, aspect kept')) or 'crop' in image:
        grey_arrays = image['channels'] == 1 and manifest['classes'] == _numbers(manifest)
        return IDX if grey_arrays else PHOTOGRAPHS
    return None


def of_manifest(manifest: dict[str, Any]) -> str | None:
    """Returns the kind in a manifest, with the crop rule for photographs.

    Manifests without a crop rule are older; their photographs have torchvision's.
    """
    kind = manifest['kind']
    crop = manifest['image'].get('crop', 'torchvision')
    return f'{kind}/{crop}' if kind == PHOTOGRAPHS else kind


def class_names(manifest: dict[str, Any]) -> list[str] | None:
    """Returns a prepared dataset's class names by label; None if it has none or only numbers."""
    names = manifest['classes']
    if names is None or names != _numbers(manifest):
        return names
    # Class folders may have numbers as names, and are sorted by name.
    return names if manifest['kind'] == PHOTOGRAPHS and names == sorted(names) else None


def _numbers(manifest: dict[str, Any]) -> list[str]:
    names = manifest['classes'] or ['0']
    first = int(names[0] == '1')
    return [str(k) for k in range(first, first + len(names))]


def of_tfds(name: str) -> str | None:
    """Returns the kind of a TFDS dataset such as 'imagenet_resized/64x64'; None if unknown."""
    plain = name.partition('/')[0].partition(':')[0]
    return plain if plain in _TFDS else None


def plain(kind: str | None) -> str | None:
    """Returns the kind without its crop rule."""
    return kind and kind.partition('/')[0]


def described(kind: str | None) -> str:
    """Describes the kind in words."""
    if kind is None:
        return 'images of an unknown kind'
    kind, _, crop = kind.partition('/')
    name = NAMES.get(kind, kind)
    return f'{name} as {crop} does' if crop else name


def mismatch(expected: Sequence[str], kind: str | None) -> str | None:
    """Returns a warning if a config states its result for other kinds; else None.

    Args:
        expected: kinds, with or without a crop rule; empty if the config states no result.
        kind: the kind of the current dataset.
    """
    if not expected or kind in expected or plain(kind) in expected:
        return None
    stated = ' or '.join(map(described, expected))
    return (
        f'the result stated in this config is for {stated}, but this dataset has '
        f'{described(kind)}: do not compare the two'
    )
