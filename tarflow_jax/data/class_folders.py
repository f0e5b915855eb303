"""Folders or archives of CLASS/IMAGE, also below folders of splits, and ImageNet in its layouts."""

from pathlib import Path

from tarflow_jax.data import imagenet_labels, sizes
from tarflow_jax.data.listing import File, Listing
from tarflow_jax.data.splits import Group, Pictures, Wanted, chosen, set_name, split_of_folder

DOWNSAMPLED = 'downsampled_imagenet/{0}x{0}'
_KAGGLE = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC')  # where the images are
_PARENTS_WITH_LABELS = 4

# A file or an empty folder, as the parts of its name.
_Placed = list[tuple[list[str], File | None]]


def images_folder(source: Path) -> Path:
    """The folder of the images in what Kaggle serves; the source itself elsewhere."""
    return next((source / name for name in _KAGGLE if (source / name).is_dir()), source)


def find(source: Path, listing: Listing, wanted: Wanted) -> Pictures:
    """Finds out which images are of which split and class.

    Args:
        source: the folder or archive.
        listing: what is in it, or in its `images_folder`.
        wanted: what the command line asks for.

    Raises:
        FileNotFoundError: the labels given are not there.
        ValueError: two folders are one split, only some splits have classes, or labels are missing.
    """
    placed: _Placed = [(file.name.split('/'), file) for file in listing.files]
    placed += [(folder.split('/'), None) for folder in sorted(listing.folders)]
    placed = _unwrapped(_below_kaggle(placed))
    tops = {parts[0] for parts, file in placed if len(parts) > 1}
    names = sorted(top for top in tops if split_of_folder(top))
    notes: list[tuple[str, str]] = []
    if names:
        found: dict[str | None, tuple[str, _Placed]] = {}
        for name in names:
            split, _ = split_of_folder(name)
            if split in found:
                raise ValueError(
                    f'{source} holds {found[split][0]} and {name}, two names of one split; take '
                    'one of them away.'
                )
            inside = [(parts[1:], file) for parts, file in placed if parts[0] == name and parts[1:]]
            found[split] = name, _unwrapped(inside, splits=True)
        notes += _outside(placed, names)
        found = chosen(found, wanted.split, source)
    else:
        found = {None: (source.name.removesuffix('.tar').removesuffix('.zip'), placed)}
    size = _own_size(source, [name for name, _ in found.values()], wanted)
    parts = {split: inside for split, (_, inside) in found.items()}
    groups, classes, more = _classes(source, parts, wanted)
    first = next(iter(groups))
    groups[first] = groups[first]._replace(notes=(*groups[first].notes, *notes, *more))
    dataset = DOWNSAMPLED.format(size[0]) if size else set_name(source)
    return Pictures(groups, classes, size, dataset, by_folder=True)


def _below_kaggle(placed: _Placed) -> _Placed:
    """Only what is below ILSVRC/Data/CLS-LOC, where there is such a folder, as in Kaggle's zip."""
    for name in _KAGGLE:
        top = name.split('/')
        below = [(parts[len(top):], file) for parts, file in placed if parts[:len(top)] == top]
        below = [(parts, file) for parts, file in below if parts]
        if below:
            return below
    return placed


def _unwrapped(placed: _Placed, splits: bool = False) -> _Placed:
    """Without the folders that hold all the rest, such as afhq/ around afhq/train/cat/1.jpg.

    A folder around nothing but files is a class, and kept, unless it is named like a split and
    `splits` lets these go too. Files may lie beside folders of splits, as a README does.
    """
    while True:
        files = [parts for parts, file in placed if file]
        tops = {parts[0] for parts, _ in placed}
        if len(tops) != 1 or not files:
            return placed
        is_split = bool(split_of_folder(next(iter(tops))))
        depth = 2 if is_split else 3
        of_splits = any(len(parts) > 2 and split_of_folder(parts[1]) for parts in files)
        if (is_split and not splits) or (min(map(len, files)) < depth and not of_splits):
            return placed
        placed = [(parts[1:], file) for parts, file in placed if parts[1:]]


def _outside(placed: _Placed, names: list[str]) -> list[tuple[str, str]]:
    counts: dict[str, int] = {}
    whole: dict[str, str] = {}
    for parts, file in placed:
        if file and parts[0] not in names:
            counts[parts[0]] = counts.get(parts[0], 0) + 1
            whole[parts[0]] = file.name
    return [
        (whole[top], 'lies outside the splits and was left out') if count == 1 else
        (top, f'lies outside the splits, and its {count} files were left out')
        for top, count in counts.items()
    ]


def _own_size(source: Path, names: list[str], wanted: Wanted) -> tuple[int, int] | None:
    """The size that names such as train_64x64 give."""
    found = {side for _, side in filter(None, map(split_of_folder, names))} - {None}
    if len(found) > 1:
        raise ValueError(f'{source} holds the sizes {sorted(found)}; prepare one of them.')
    if not found:
        return None
    size = sizes.parse(found.pop())
    if wanted.size not in (None, size):
        raise ValueError(
            f'--size is {sizes.text(wanted.size)}, but {source} holds images of size '
            f'{sizes.text(size)}, resized before; leave --size away.'
        )
    return size


def _classes(source: Path, found: dict[str | None, _Placed], wanted: Wanted):
    """The images of each split with their classes; the sorted classes; what there is to know."""
    flat = {
        split for split, placed in found.items()
        if not any(file is None or len(parts) > 1 for parts, file in placed)
    }
    notes: list[tuple[str, str]] = []
    labels = None
    if (others := flat - {'test'}) or wanted.labels:
        names = [file.name for split in others or flat for _, file in found[split]]
        labels = _labels(source, names, wanted)
    if 'test' in flat and len(found) > 1 and (labels or len(found) > len(flat)):
        del found['test']
        flat.remove('test')
        notes.append((
            'test', 'has no classes, which the other splits have, and was left out; prepare it '
            'with --split=test in a folder of its own'
        ))
    if flat and len(found) > len(flat) and labels is None:
        raise ValueError(
            f'the split {next(iter(flat))} of {source} has no class folders and others have; sort '
            'its images into the folders of their classes, name a file of labels with --labels, or '
            'prepare it in a folder of its own.'
        )
    groups, classes = {}, set(labels.classes) if labels else set()
    for split, placed in found.items():
        if split in flat and labels is None:
            groups[split] = Group([file for _, file in placed], None)
            continue
        if split in flat:
            groups[split] = _labelled(placed, labels)
            continue
        groups[split] = Group(
            [file for parts, file in placed if file and len(parts) > 1],
            [parts[0] for parts, file in placed if file and len(parts) > 1],
            tuple((file.name, 'lies in no class folder and was left out')
                  for parts, file in placed if file and len(parts) == 1),
        )
        classes |= {parts[0] for parts, file in placed if file is None or len(parts) > 1}
    return groups, sorted(classes) or None, notes


def _labels(source: Path, names: list[str], wanted: Wanted) -> imagenet_labels.Labels | None:
    """The labels of files that lie in no class folders."""
    if wanted.labels is not None and not names:
        raise ValueError(
            f'--labels is {wanted.labels}, but all images of {source} lie in folders of their '
            'classes; leave --labels away.'
        )
    if wanted.labels is None and not imagenet_labels.is_flat(
        name.rpartition('/')[2] for name in names
    ):
        return None
    folders = [source] * source.is_dir() + list(source.absolute().parents)[:_PARENTS_WITH_LABELS]
    return imagenet_labels.find(folders, wanted.labels)


def _labelled(placed: _Placed, labels: imagenet_labels.Labels) -> Group:
    files = [file for _, file in placed if file]
    stems = [file.name.rpartition('/')[2].rpartition('.')[0] for file in files]
    missing = next((stem for stem in stems if stem not in labels.class_of), None)
    if missing is not None:
        raise ValueError(
            f'{labels.path} has no label for {missing}; give the labels of these images as '
            '--labels, or take the image away.'
        )
    return Group(files, [labels.class_of[stem] for stem in stems])
