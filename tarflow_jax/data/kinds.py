"""Kinds of sets of images: numbers measured on two kinds cannot be compared.

A kind is a word, such as 'imagenet_resized'. Where images were cropped, the rule follows:
'photographs/torchvision'.
"""

from collections.abc import Sequence
from typing import Any

PHOTOGRAPHS = 'photographs'
BOX_RESIZED = 'imagenet_resized'
DOWNSAMPLED = 'downsampled_imagenet'
IDX = 'idx'
CIFAR10 = 'cifar10'
EMBEDDED = 'embedded'
SAMPLES = 'samples'
NAMES = {
    PHOTOGRAPHS: 'photographs, resized and cropped',
    BOX_RESIZED: "the ImageNet site's downsampled images (squashed by a box filter, not cropped)",
    DOWNSAMPLED: 'the older downsampled ImageNet (van den Oord et al.)',
    IDX: 'IDX files',
    CIFAR10: 'CIFAR-10',
    EMBEDDED: 'the embedded images',
    SAMPLES: 'samples of a flow',
}
# Their labels are numbers in the files, the same for everyone who reads these.
NUMBERED = (IDX, CIFAR10, EMBEDDED)
_FIRST_CROP = 'torchvision'  # the only rule that manifests without `crop` were made by
_TFDS = (BOX_RESIZED, DOWNSAMPLED, CIFAR10)


def of_manifest(manifest: dict[str, Any]) -> str | None:
    """The kind of a prepared set, with its crop rule; None if it is unknown.

    Args:
        manifest: of the set.
    """
    kind = manifest['kind']
    crop = manifest.get('image', {}).get('crop', _FIRST_CROP if kind == PHOTOGRAPHS else None)
    return f'{kind}/{crop}' if kind and crop else kind


def inferred(manifest: dict[str, Any]) -> str | None:
    """The kind of a set whose manifest is of version 0.1, which does not name it; None if unknown.

    What it says of the preprocessing tells.
    """
    how, image = manifest.get('preprocessing', ''), manifest.get('image', {})
    if how == 'none':
        return IDX
    if how.startswith('none: drawn'):
        return SAMPLES
    if how.startswith('none: the pixels are those of the files'):
        return BOX_RESIZED if 'ImageNet site' in how else DOWNSAMPLED
    if how.startswith(('short side resized', 'resized, aspect kept')) or 'crop' in image:
        return PHOTOGRAPHS if image['channels'] == 3 else IDX
    return None


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
