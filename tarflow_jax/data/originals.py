"""Recognises the kind of a source of images by its contents."""

from pathlib import Path

from tarflow_jax.data import (
    batch_files,
    cifar_files,
    cropping,
    idx_sets,
    parquet_sets,
    picture_sets,
    sizes,
)
from tarflow_jax.data.splits import Originals, Wanted

# Each function returns a source as Originals, or None if it is of another kind.
_KINDS = (
    batch_files.recognise, idx_sets.recognise, cifar_files.recognise, parquet_sets.recognise,
    picture_sets.recognise,
)


def recognise(source: str, *, wanted: Wanted, name: str | None = None) -> Originals:
    """Recognises a source.

    Args:
        source: a folder, an archive or a file.
        wanted: the options of the command line.
        name: the name of the dataset; None takes the name of the source.

    Raises:
        FileNotFoundError: the source or a part of it does not exist.
        ValueError: its kind is unknown, it is damaged, or it does not support the options.
    """
    _check(wanted)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f'{source} does not exist; correct the path.')
    found = next(filter(None, (kind(path, wanted) for kind in _KINDS)))
    files = any(split.names is not None for split in found.splits.values())
    if not files and wanted.test_fraction is not None:
        raise ValueError(
            f'--test_fraction is {wanted.test_fraction}, but {source} already has splits; '
            'leave out --test_fraction.'
        )
    if not files and wanted.labels is not None:
        raise ValueError(
            f'--labels is {wanted.labels}, but {source} already has labels; leave out --labels'
            '.'
        )
    for flag, given in (('--rotate', wanted.rotate), ('--background', wanted.background)):
        if given and not found.encoded:
            raise ValueError(
                f'{flag} is for image files, but {source} has arrays; leave out {flag}.'
            )
    if wanted.classes is not None and found.classes is not None:
        unknown = [k for k in found.classes if k not in wanted.classes]
        if unknown:
            raise ValueError(
                f'{source} has the class {unknown[0]!r}, which is not among the '
                f'{len(wanted.classes)} classes prepared before; prepare all splits again in '
                'another folder.'
            )
        if not files and found.classes != wanted.classes[:len(found.classes)]:
            raise ValueError(
                f'{source} has its classes in another order than the splits prepared before; '
                'prepare all splits again in another folder.'
            )
        found = found._replace(classes=wanted.classes)
    return found._replace(dataset=name or found.dataset)


def _check(wanted: Wanted) -> None:
    if wanted.crop not in cropping.RULES:
        raise ValueError(f'--crop is {wanted.crop!r}; choose one of {", ".join(cropping.RULES)}.')
    if wanted.crop != 'torchvision' and wanted.size and wanted.size[0] != wanted.size[1]:
        raise ValueError(
            f'--size is {sizes.text(wanted.size)}, but --crop={wanted.crop} needs a square; choose '
            'a square size, or --crop=torchvision.'
        )
    if wanted.test_fraction is not None and not 0 < wanted.test_fraction < 1:
        raise ValueError(
            f'--test_fraction is {wanted.test_fraction}; choose one between 0 and 1, such as 0.1.'
        )
