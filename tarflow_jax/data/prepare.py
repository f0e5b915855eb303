"""Prepares a set of images for training: sharded ArrayRecord that is read at random.

    python -m tarflow_jax.data.prepare SOURCE --out=DIR [--size=64] [--crop=RULE] [--rotate]
        [--background=COLOUR] [--split=NAME] [--test_fraction=0.1] [--labels=FILE] [--name=NAME]
        [--features=FILE] [--strict] [--workers=N]

SOURCE is what people have, recognised by looking:
  - folders or a .tar or .zip of CLASS/IMAGE (ImageNet, AFHQ), also below train/, val/ and test/,
    or of images without classes;
  - ImageNet's .tar of one .tar per class, its flat ILSVRC2012_img_val.tar, and Kaggle's layout
    (ILSVRC/Data/CLS-LOC): the classes of validation images come from LOC_val_solution.csv or
    ILSVRC2012_devkit_t12 (unpacked or .tar.gz), which are looked for beside SOURCE;
  - the ImageNet site's ImageNet64 (or 32, 16, 8): a folder with train_data_batch_1 to 10, val_data,
    and, for the names of the classes, map_clsloc.txt; or their .npz, as
    Imagenet64_train_part1_npz.zip, _part2_npz.zip and Imagenet64_val_npz.zip, or unpacked;
  - the older ImageNet64: train_64x64 and valid_64x64, folders or .tar of PNG files;
  - .parquet files of Hugging Face, one or a folder of them: a column image or img, and label,
    labels or fine_label;
  - a .zip or folder of StyleGAN's or EDM's dataset_tool.py, with or without labels in dataset.json;
  - WebDataset shards, .tar files of KEY.jpg with KEY.cls or KEY.json;
  - CIFAR-10 and CIFAR-100: the .tar.gz for Python, binary or MATLAB, or its folder;
  - a folder of IDX files (MNIST).
Left out are files and folders whose name starts with a dot, and what systems leave behind, such as
__MACOSX, @eaDir, lost+found and $RECYCLE.BIN. Images that cannot be used are named and skipped.

--size is one number for squares, or HEIGHTxWIDTH such as 48x32. Without it, arrays, EDM's sets and
parquet files of squares keep their size, and photographs become 64x64.

--crop says how photographs are made that size: torchvision (Resize and CenterCrop, bilinear; also
for rectangles), edm (dataset_tool.py's center-crop, Lanczos) or adm (guided-diffusion's
center_crop_arr, box and bicubic).

Images whose files are all grey keep one channel; one in colour makes all of them RGB.

--rotate turns photographs as their EXIF orientation says. Without it they stay as they lie in the
file, as torchvision leaves them, and are counted.

--background=white (or black, or R,G,B) is painted behind what is transparent. Without it the
colours are taken that the files hold there, and the images are counted.

--test_fraction puts a part of a source without splits aside as the split test. Which images, their
names decide, so that adding others moves none of them.

--labels names the file of labels, LOC_val_solution.csv, ILSVRC2012_validation_ground_truth.txt
(with meta.mat beside it) or ILSVRC2012_devkit_t12.tar.gz, where it is not beside SOURCE.

--features adds a vector of numbers to each image. For image files FILE is a .csv with a header; its
first column is the path of the image in SOURCE (train/cat/1.png), the others are the numbers. For
parquet, batch, CIFAR and IDX files it is a .npy [N, F] of one split (--split=NAME), row k for
image k.

DIR, a folder or gs://BUCKET/FOLDER, gets the shards, manifest.json, and what TFDS needs to read
them: train with --config.data.source=prepared --config.data.path=DIR. The same command goes on
after an interruption and mends a DIR that was damaged; with another split, it adds to DIR.
"""

import collections
import functools
import hashlib
import json
import logging
import os
import re
import sys
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import tqdm
from etils import epath
from tqdm.contrib.logging import logging_redirect_tqdm

from tarflow_jax import __version__, json_files, lock, paths
from tarflow_jax.data import feature_files, kinds, originals, prepare_flags, shards, sizes
from tarflow_jax.data import manifest as manifests
from tarflow_jax.data.image_files import COUNTED
from tarflow_jax.data.splits import Split, Wanted, images_per_shard

log = logging.getLogger('tarflow_jax')

MAX_LISTED = 1000
PLAN = 'plan.json'
PATHS = ('source', 'out', 'labels', 'features')  # of the arguments


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code.

    0: done; 2: bad input; 1: failed underway; 130: Ctrl-C. After all but 2, the same command goes
    on.
    """
    logging.basicConfig(
        level=logging.WARNING, format='%(asctime)s %(message)s', datefmt='%H:%M:%S', force=True
    )
    log.setLevel(logging.INFO)
    try:
        given = prepare_flags.parser(__doc__).parse_args(argv[1:])
    except SystemExit as error:
        return error.code
    try:
        for name in PATHS:
            if value := getattr(given, name):
                setattr(given, name, _resolved(name, value))
        with logging_redirect_tqdm():
            prepare(
                given.source, given.out, size=given.size, crop=given.crop, split=given.split,
                test_fraction=given.test_fraction, labels=given.labels, name=given.name,
                rotate=given.rotate, background=given.background,
                features=given.features, strict=given.strict, workers=given.workers,
            )
    except (ValueError, FileNotFoundError, lock.Taken) as error:
        log.error('error: %s', str(error).replace('\n', r'\n'))  # which names of files may hold
        return 2
    except (OSError, BrokenProcessPool) as error:
        log.error('error: %s; the same command goes on.', str(error).rstrip('.'))
        return 1
    except KeyboardInterrupt:
        log.error('interrupted; the same command goes on.')
        return 130
    return 0


def _resolved(name: str, value: str) -> str:
    label = value if name == 'source' else f'--{name}={value}'
    path = paths.resolved(value, label, {'out': 'folder', 'source': 'any'}.get(name, 'file'))
    if name != 'out' and paths.in_bucket(path):
        raise ValueError(
            f'{label} is in a bucket; copy it to a disk first (gcloud storage cp --recursive).'
        )
    paths.reach(path, label, write=True)
    return path


def prepare(source: str, out: str, *, size: int | tuple[int, int] | None = None,
            crop: str = 'torchvision', split: str | None = None,
            test_fraction: float | None = None, labels: str | None = None,
            rotate: bool = False, background: tuple[int, int, int] | None = None,
            name: str | None = None, features: str | None = None, strict: bool = False,
            workers: int = 1) -> None:
    """Prepares the splits of a source in a folder, as far as this is not done yet.

    Args:
        source: see the top of this file.
        out: the folder, local or gs://.
        size: one number for squares, or (height, width); None is the source's own, or 64 for
            photographs.
        crop: how photographs are made that size, see `cropping`.
        split: the one split that the source is, or that is wanted of it; None is all.
        test_fraction: the part of a source without splits that becomes its split `test`.
        labels: a file with the classes of ImageNet's validation images; None looks for it.
        rotate: whether to turn images as EXIF says.
        background: the colour behind what is transparent; None takes the hidden colours.
        name: of the set; None is the one that the source goes by.
        features: a .csv or .npy with features of the images; None is none.
        strict: whether an image that cannot be used is an error.
        workers: processes that decode and encode.

    Raises:
        FileNotFoundError, ValueError: the source, the features or the folder cannot be used, see
            `originals.recognise` and `feature_files.attach`; or, with `strict`, one of the images.
        Taken: another process prepares a set in the folder.
        OSError: something cannot be read or written.
    """
    folder = manifests.folder_path(out)
    _check_place(folder, source)
    lock.check(folder)
    before = manifests.read(folder)
    wanted = Wanted(
        None if size is None else sizes.pair(size), split, crop, labels, test_fraction,
        before and before['classes'], rotate, background, before and before['image']['channels'],
    )
    found = originals.recognise(source, wanted=wanted, name=name)
    if features is not None:
        found = feature_files.attach(found, features)
    settings = _settings(found, wanted)
    if before:
        if 'crop' not in before['image'] and found.crop == 'torchvision':
            del settings['image']['crop']  # as versions before the other rules wrote it
        _check_same(folder, before, settings)
    per_shard = images_per_shard(found.size, found.channels)
    plans = {key: _plan(settings, part.identity, per_shard) for key, part in found.splits.items()}
    _check_notes(found.splits, strict)
    with lock.held(folder):
        if manifests.read(folder) != before:
            raise OSError(f'{folder} was prepared by another process meanwhile')
        _write(folder, settings, found, plans, before, strict, workers)


def _write(
    folder: epath.Path, settings: dict, found: originals.Originals, plans: dict[str, str],
    before: dict | None, strict: bool, workers: int,
) -> None:
    """Writes what is missing in the folder, which no other process writes to."""
    _begin(folder, plans, before)
    per_shard = images_per_shard(found.size, found.channels)
    done = dict(before['splits']) if before else {}
    total = sum(part.count for part in found.splits.values())
    bar = tqdm.tqdm(total=total, unit='image', disable=None)
    with shards.worker_processes(workers) as pool, bar as progress:
        for key, part in found.splits.items():
            names = shards.names(settings['tfds_name'], key, -(-part.count // per_shard))
            places = dict(zip(names, shards.bounds(part.count, per_shard)))
            write = functools.partial(
                shards.write, folder, part, pool=pool, workers=workers,
                labelled=found.classes is not None, strict=strict, progress=progress,
            )
            if key in done:
                _mend(folder, key, done[key], places, write, strict, progress)
            else:
                told = _write_rest(folder, key, places, write, strict, progress)
                done[key] = _entry(key, part, plans[key], told)
                _count_notes(key, told)
    kind, splits = kinds.of_set(settings), dict(sorted(done.items()))
    whole = {'format': manifests.FORMAT, **settings, 'kind': kind, 'splits': splits}
    if whole != before:
        manifests.write(folder, whole)
    log.info(
        '%s %s: %s', folder, 'is prepared' if whole != before else 'is already prepared',
        ', '.join(
            f'{key} {sum(shard["records"] for shard in entry["shards"])} images in '
            f'{len(entry["shards"])} shard(s), {entry["skipped"]["count"]} skipped'
            for key, entry in whole['splits'].items()
        ),
    )
    (folder / manifests.PROGRESS).rmtree()
    for left in folder.glob('*.part'):  # of a process that was killed
        left.unlink()


def _settings(found: originals.Originals, wanted: Wanted) -> dict[str, Any]:
    """What all splits of a set have in common, but for its kind, which follows from these."""
    plain = re.sub(r'[^a-z0-9]+', '_', found.dataset.partition(' (')[0].lower()).strip('_')
    settings = {
        'dataset': found.dataset,
        'tfds_name': plain if plain[:1].isalpha() else f'images_{plain}'.strip('_'),
        'image': {
            'size': sizes.plain(found.size), 'channels': found.channels, 'encoding': 'png'
        },
        'preprocessing': found.preprocessing,
        'classes': found.classes,
    }
    if found.crop is not None:  # a set whose images are not cropped has no such key
        settings['image']['crop'] = found.crop
    if wanted.rotate:  # as with these two
        settings['image']['rotated'] = 'as EXIF says'
    if wanted.background is not None:
        settings['image']['background'] = list(wanted.background)
    if found.features is not None:  # a set without them has no such key
        settings['features'] = found.features
    return settings


def _check_place(folder: epath.Path, source: str) -> None:
    if not manifests.is_local(folder):
        return
    if folder.is_file():
        raise ValueError(f'{folder} is a file; give a folder as --out.')
    if folder.resolve().is_relative_to(os.path.realpath(source)):
        raise ValueError(
            f'{folder} lies inside {source}, and would be taken for images; give a folder outside '
            'as --out.'
        )


def _check_same(folder: epath.Path, before: dict, settings: dict) -> None:
    for key in (*settings, 'features'):
        has, wants = before.get(key), settings.get(key)
        if has != wants:
            if key == 'features':
                raise ValueError(
                    f'{folder} holds a set with {_columns(has)}, and this one has '
                    f'{_columns(wants)}; give the same columns as --features, or another --out.'
                )
            if key == 'classes':  # what is too long to say; one of them is None
                has, wants = (v and 'labels' for v in (has, wants))
            remedy = ', or --name if it is the same set' if key == 'dataset' else ''
            raise ValueError(
                f'{folder} holds a set with {key} {has!r}, and this one has {wants!r}; give '
                f'another --out{remedy}.'
            )


def _columns(features: list[str] | None) -> str:
    if features is None:
        return 'no features'
    return f'{len(features)} features ({", ".join(features[:8])}{", ..." * (len(features) > 8)})'


def _plan(settings: dict, identity: str, per_shard: int) -> str:
    """Tells whether shards on the disk are those that this command would write."""
    image = settings['image']
    if image.get('crop') == 'torchvision':  # which versions before the other rules did not name
        image = {key: value for key, value in image.items() if key != 'crop'}
    text = json.dumps([manifests.FORMAT, settings | {'image': image}, identity, per_shard])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_notes(splits: dict[str, Split], strict: bool) -> None:
    for key, part in splits.items():
        for name, note in part.notes:
            log.info('%s: %s %s', key, name, note)
        if part.count == 0:
            raise ValueError(f'the split {key} holds no file; give another source.')
        if strict and part.problems:
            name, note = part.notes[-1]
            raise ValueError(
                f'the split {key} does not pass --strict: {name} {note}; mend it, or leave '
                '--strict away.'
            )


def _begin(folder: epath.Path, plans: dict[str, str], before: dict | None) -> None:
    """Notes in the folder what is being written, unless it is what was begun before.

    Raises:
        ValueError: something else was begun, or is done.
    """
    for key, entry in (before['splits'] if before else {}).items():
        if plans.get(key, entry.get('plan')) != entry.get('plan'):
            raise ValueError(
                f'{folder} already holds the split {key!r}, of other images or with other '
                'options; give another --out.'
            )
    path = folder / manifests.PROGRESS / PLAN
    if path.exists():
        try:
            begun = json_files.read(path)
        except json_files.Damaged as error:
            place = path.parent if before else folder
            raise ValueError(
                f'{path} is damaged ({error}); delete {place} and start the same command again.'
            ) from error
        if begun != plans:
            raise ValueError(
                f'{folder} holds a preparation that was begun with other images or options; give '
                f'the same command again, or another --out, or delete {path.parent}.'
            )
        return
    if before is None and folder.exists():
        if any(entry.name not in (manifests.PROGRESS, lock.FILE) for entry in folder.iterdir()):
            raise ValueError(f'{folder} holds other files; give an empty or new folder as --out.')
    path.parent.mkdir(parents=True, exist_ok=True)
    manifests.replace(path, json.dumps(plans))


def _write_rest(folder, key: str, places: dict, write, strict: bool, progress) -> list[dict]:
    """Writes the shards that are not finished; returns what is told of all, in order."""
    kept = shards.finished(folder, list(places))
    if kept:
        log.info('%s: %d of %d shards are finished and kept', key, len(kept), len(places))
    for name, shard in kept.items():
        _check_skipped(name, shard['skipped'], strict)
        progress.update(places[name][1] - places[name][0])
    told = kept | write({name: place for name, place in places.items() if name not in kept})
    if not any(shard['records'] for shard in told.values()):
        raise ValueError(f'the split {key} holds no image that can be used; see above.')
    return [told[name] for name in places]


def _mend(folder, key: str, entry: dict, places: dict, write, strict: bool, progress) -> None:
    """Writes the shards of a finished split anew that are damaged."""
    if [shard['name'] for shard in entry['shards']] != list(places):
        raise ValueError(
            f'{folder / manifests.FILE} is damaged (it names other shards of {key}); delete '
            f'{folder} and prepare the set again.'
        )
    _check_skipped(key, entry['skipped']['list'], strict)
    damaged = manifests.damage(folder, entry['shards'], contents=True)
    for name, wrong in damaged.items():
        log.warning('%s %s; it is written anew', name, wrong)
    progress.update(sum(b - a for name, (a, b) in places.items() if name not in damaged))
    wanted = {shard['name']: shard['sha256'] for shard in entry['shards']}
    write({name: places[name] for name in damaged}, wanted=wanted)


def _check_skipped(where: str, skipped: list, strict: bool) -> None:
    if strict and skipped:
        name, reason = skipped[0]
        raise ValueError(
            f'{name} {reason}, and was skipped in {where} before; mend or remove it and prepare '
            'in another --out, or leave --strict away.'
        )


def _entry(key: str, part: Split, plan: str, told: list[dict]) -> dict[str, Any]:
    """What the manifest says of a split."""
    skipped = [item for shard in told for item in shard['skipped']]
    notes = [list(note) for note in part.notes]
    notes += [item for shard in told for item in shard['notes']]
    return {
        'images': sum(shard['records'] for shard in told),
        'plan': plan,
        'tarflow_jax': __version__,
        'shards': [{k: shard[k] for k in ('name', 'records', 'bytes', 'sha256')} for shard in told],
        'skipped': {'count': len(skipped), 'list': skipped[:MAX_LISTED]},
        'notes': {'count': len(notes), 'list': notes[:MAX_LISTED]},
    }


def _count_notes(key: str, told: list[dict]) -> None:
    """Says how many images have what many may have."""
    counts = collections.Counter(note for shard in told for _, note in shard['notes'])
    for note in COUNTED:
        if counts[note]:
            log.warning('%s: %d of %d images: each %s', key, counts[note],
                        sum(shard['records'] for shard in told), note)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
