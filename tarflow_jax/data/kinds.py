"""Kinds of sets of images: numbers measured on two kinds cannot be compared.

A kind is a word, such as 'imagenet_resized'. That of photographs goes on with the rule that they
were cropped by: 'photographs/torchvision'.
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
    FILES: 'image files as they are',
    EMBEDDED: 'the embedded images',
    SAMPLES: 'samples of a flow',
}
# Their labels are numbers in the files, the same for everyone who reads these.
NUMBERED = (IDX, CIFAR10, EMBEDDED)
CIFAR10_CLASSES = [
    'airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck',
]
_TFDS = (BOX_RESIZED, DOWNSAMPLED, CIFAR10)


def of_set(manifest: dict[str, Any]) -> str | None:
    """The kind of a prepared set without its crop rule; None if it is unknown.

    Args:
        manifest: says how the images were made; it need not name the kind.
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
    """The kind that a manifest names, with the crop rule of photographs.

    They were cropped by torchvision's before manifests named a rule.
    """
    kind = manifest['kind']
    crop = manifest['image'].get('crop', 'torchvision')
    return f'{kind}/{crop}' if kind == PHOTOGRAPHS else kind


def class_names(manifest: dict[str, Any]) -> list[str] | None:
    """Names of a prepared set's classes by label; None without, or where they are only numbers."""
    names = manifest['classes']
    if names is None or names != _numbers(manifest):
        return names
    # Folders may be called so, and are numbered in the order of their names.
    return names if manifest['kind'] == PHOTOGRAPHS and names == sorted(names) else None


def _numbers(manifest: dict[str, Any]) -> list[str]:
    names = manifest['classes'] or ['0']
    first = int(names[0] == '1')
    return [str(k) for k in range(first, first + len(names))]


def of_tfds(name: str) -> str | None:
    """The kind of a TFDS set such as 'imagenet_resized/64x64'; None if it is unknown."""
    plain = name.partition('/')[0].partition(':')[0]
    return plain if plain in _TFDS else None


def plain(kind: str | None) -> str | None:
    """The kind without its crop rule."""
    return kind and kind.partition('/')[0]


def described(kind: str | None) -> str:
    """The kind in words."""
    if kind is None:
        return 'images of an unknown kind'
    kind, _, crop = kind.partition('/')
    name = NAMES.get(kind, kind)
    return f'{name} as {crop} does' if crop else name


def mismatch(expected: Sequence[str], kind: str | None) -> str | None:
    """One sentence where a config states its result for other kinds; else None.

    Args:
        expected: kinds, with or without a crop rule; empty states no result.
        kind: of the set at hand.
    """
    if not expected or kind in expected or plain(kind) in expected:
        return None
    stated = ' or '.join(map(described, expected))
    return (
        f'the result that this config states is for {stated}, and this set holds '
        f'{described(kind)}: do not compare their numbers'
    )
