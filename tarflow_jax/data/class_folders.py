"""Finds images in CLASS/IMAGE folders or archives, in split folders, and in ImageNet's layouts."""

from pathlib import Path

from tarflow_jax.data import imagenet_labels, sizes
from tarflow_jax.data.listing import File, Listing
from tarflow_jax.data.splits import Group, Pictures, Wanted, chosen, set_name, split_of_folder

DOWNSAMPLED = 'downsampled_imagenet/{0}x{0}'
_KAGGLE = ('ILSVRC/Data/CLS-LOC', 'Data/CLS-LOC')  # the folder of the images
_PARENTS_WITH_LABELS = 4

# A file or an empty folder, as a tuple of the parts of its name.
_Placed = list[tuple[list[str], File | None]]


def images_folder(source: Path) -> Path:
    """Returns the image folder of Kaggle's layout; for other layouts, the source itself."""
    return next((source / name for name in _KAGGLE if (source / name).is_dir()), source)


def find(source: Path, listing: Listing, wanted: Wanted) -> Pictures:
    """Finds the split and class of each image.

    Args:
        source: the folder or archive.
        listing: the files in it, or in its `images_folder`.
        wanted: the options of the command line.

    Raises:
        FileNotFoundError: the file of labels does not exist.
        ValueError: two folders are the same split, only some splits have classes, or labels are
            missing.
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
                    f'{source} has {found[split][0]} and {name}, two names for one split; remove '
                    'one of them.'
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
    """Keeps only the files below ILSVRC/Data/CLS-LOC if it exists, as in Kaggle's zip."""
    for name in _KAGGLE:
        top = name.split('/')
        below = [(parts[len(top):], file) for parts, file in placed if parts[:len(top)] == top]
        below = [(parts, file) for parts, file in below if parts]
        if below:
            return below
    return placed


def _unwrapped(placed: _Placed, splits: bool = False) -> _Placed:
    """Strips outer folders that contain everything, such as afhq/ in afhq/train/cat/1.jpg.

    A folder that contains only files is a class and is kept, unless it is named like a split and
    `splits` is True. Split folders may have other files next to them, such as a README.
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
        (whole[top], 'is outside the splits and was left out') if count == 1 else
        (top, f'is outside the splits, and its {count} files were left out')
        for top, count in counts.items()
    ]


def _own_size(source: Path, names: list[str], wanted: Wanted) -> tuple[int, int] | None:
    """Returns the size in names such as train_64x64."""
    found = {side for _, side in filter(None, map(split_of_folder, names))} - {None}
    if len(found) > 1:
        raise ValueError(f'{source} has the sizes {sorted(found)}; prepare one of them.')
    if not found:
        return None
    size = sizes.parse(found.pop())
    if wanted.size not in (None, size):
        raise ValueError(
            f'--size is {sizes.text(wanted.size)}, but {source} has images already resized to '
            f'{sizes.text(size)}; leave out --size.'
        )
    return size


def _classes(source: Path, found: dict[str | None, _Placed], wanted: Wanted):
    """Returns each split's images with their classes, the sorted classes, and notes."""
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
            'test', 'has no classes, but the other splits have, so it was left out; prepare it '
            'with --split=test in its own --out'
        ))
    if flat and len(found) > len(flat) and labels is None:
        raise ValueError(
            f'the split {next(iter(flat))} of {source} has no class folders, but others have; sort '
            'its images into class folders, give a file of labels with --labels, or prepare it in '
            'its own --out.'
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
            tuple((file.name, 'is not in a class folder and was left out')
                  for parts, file in placed if file and len(parts) == 1),
        )
        classes |= {parts[0] for parts, file in placed if file is None or len(parts) > 1}
    return groups, sorted(classes) or None, notes


def _labels(source: Path, names: list[str], wanted: Wanted) -> imagenet_labels.Labels | None:
    """Returns the labels of files that are not in class folders."""
    if wanted.labels is not None and not names:
        raise ValueError(
            f'--labels is {wanted.labels}, but all images of {source} are in class folders; '
            'leave out --labels.'
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
            f'{labels.path} has no label for {missing}; pass the labels of these images as '
            '--labels, or remove the image.'
        )
    return Group(files, [labels.class_of[stem] for stem in stems])
