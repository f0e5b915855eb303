"""Recognises folders of IDX files in the layout of MNIST."""

from pathlib import Path

from tarflow_jax.data import sources
from tarflow_jax.data.splits import Originals, Wanted, arrays_in_memory, chosen, set_name


def recognise(source: Path, wanted: Wanted) -> Originals | None:
    """Recognises the IDX files in a folder; returns None if there are none.

    Raises:
        FileNotFoundError: a file of labels is missing.
        ValueError: a file is damaged, or the images have several shapes.
    """
    if not source.is_dir():
        return None
    found = {
        split: prefix for split, prefix in sources.IDX_PREFIXES.items()
        if any(source.glob(f'{prefix}-images[-.]idx3-ubyte*'))
    }
    if not found:
        return None
    found = chosen(found, wanted.split, source)
    opened = {split: sources.idx_folder(source, split) for split in found}
    shapes = {split.image_NxHxWxC.shape[1:] for split in opened.values()}
    if len(shapes) > 1:
        raise ValueError(
            f'{source} has images of the shapes {sorted(shapes)}; prepare one dataset at a time.'
        )
    (height, width, channels), = shapes
    if channels not in (1, 3):
        raise ValueError(
            f'{source} has images [{height},{width},{channels}]; they must have 1 or 3 channels.'
        )
    splits = {
        split: (f'{found[split]}-images', arrays.image_NxHxWxC, arrays.label_N)
        for split, arrays in opened.items()
    }
    classes = 1 + max(int(arrays.label_N.max()) for arrays in opened.values())
    return arrays_in_memory(
        set_name(source), splits, [str(k) for k in range(classes)], wanted
    )
