"""Prepares images for training: writes sharded ArrayRecord files that allow random access.

    python -m tarflow_jax.data.prepare SOURCE --out=DIR [--size=64] [--crop=RULE] [--rotate]
        [--background=COLOUR] [--split=NAME] [--test_fraction=0.1] [--labels=FILE] [--name=NAME]
        [--features=FILE] [--strict] [--workers=N]

SOURCE is one of these; its kind is recognised by its contents:
  - folders, a .tar or a .zip of CLASS/IMAGE (ImageNet, AFHQ), also below train/, val/ and test/,
    or of images without classes;
  - ImageNet's .tar of one .tar per class, its flat ILSVRC2012_img_val.tar, and Kaggle's layout
    (ILSVRC/Data/CLS-LOC): the classes of validation images come from LOC_val_solution.csv or
    ILSVRC2012_devkit_t12 (unpacked or .tar.gz) next to SOURCE;
  - the ImageNet site's ImageNet64 (or 32, 16, 8): a folder with train_data_batch_1 to 10, val_data,
    and map_clsloc.txt for the class names; or the .npz files, unpacked or as
    Imagenet64_train_part1_npz.zip, _part2_npz.zip and Imagenet64_val_npz.zip;
  - the older ImageNet64: train_64x64 and valid_64x64, folders or .tar of PNG files;
  - .parquet files of Hugging Face, one or a folder of them: a column image or img, and label,
    labels or fine_label;
  - a .zip or folder of StyleGAN's or EDM's dataset_tool.py, with or without labels in dataset.json;
  - WebDataset shards, .tar files of KEY.jpg with KEY.cls or KEY.json;
  - CIFAR-10 and CIFAR-100: the .tar.gz for Python, binary or MATLAB, or its folder;
  - a folder of IDX files (MNIST).
Names that start with a dot are left out, and so are system files such as __MACOSX, @eaDir,
lost+found and $RECYCLE.BIN. Images that cannot be used are listed and skipped.

--size is one number for squares, or HEIGHTxWIDTH such as 48x32. Without it, arrays, EDM datasets
and parquet files of squares keep their size, and photographs become 64x64.

--crop is the rule for resizing and cropping photographs: torchvision (Resize and CenterCrop,
bilinear; also for rectangles), edm (dataset_tool.py's center-crop, Lanczos) or adm
(guided-diffusion's center_crop_arr, box and bicubic).

If all image files are grey, they keep one channel; one colour image makes all of them RGB.

--rotate applies the EXIF orientation of photographs. Without it they stay unrotated, as in
torchvision, and their number is reported.

--background=white (or black, or R,G,B) fills transparent pixels. Without it they keep the hidden
colours of the file, and the number of such images is reported.

--test_fraction splits off a part of a source without splits as the split test. The name of an image
decides whether it is in the test split, so adding images moves none of the others.

--labels is the file of labels, if it is not next to SOURCE: LOC_val_solution.csv,
ILSVRC2012_validation_ground_truth.txt (with meta.mat next to it) or ILSVRC2012_devkit_t12.tar.gz.

--features adds a vector of numbers to each image. For image files, FILE is a .csv with a header.
Its first column is the path of the image in SOURCE (train/cat/1.png); the others are the numbers.
For parquet, batch, CIFAR and IDX files, FILE is a .npy [N, F] for one split (--split=NAME), with
row k for image k.

DIR is a folder or gs://BUCKET/FOLDER. It gets the shards, manifest.json, and the files that TFDS
needs to read them. To train, pass --config.data.source=prepared --config.data.path=DIR. Run the
same command again to resume after an interruption or to repair a damaged DIR; run it with another
split to add that to DIR.
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
PATHS = ('source', 'out', 'labels', 'features')  # arguments that are paths


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code.

    0: done; 1: failed midway; 2: invalid input; 130: Ctrl-C. After 1 and 130, the same command
    resumes.
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
        log.error('error: %s', str(error).replace('\n', r'\n'))  # file names may contain newlines
        return 2
    except (OSError, BrokenProcessPool) as error:
        log.error('error: %s; run the same command again to resume.', str(error).rstrip('.'))
        return 1
    except KeyboardInterrupt:
        log.error('interrupted; run the same command again to resume.')
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
    """Prepares the splits of a source in a folder; finished parts are kept.

    Args:
        source: see the top of this file.
        out: the folder, local or gs://.
        size: one number for squares, or (height, width); None takes the size of the source, or 64
            for photographs.
        crop: the rule for resizing and cropping photographs, see `cropping`.
        split: the split of the source, or the one to take from it; None for all.
        test_fraction: the fraction of a source without splits that becomes its split `test`.
        labels: a file with the classes of ImageNet's validation images; None searches for it.
        rotate: whether to apply the EXIF orientation.
        background: the colour for transparent pixels; None keeps their hidden colours.
        name: the name of the dataset; None takes the name of the source.
        features: a .csv or .npy with features of the images; None for no features.
        strict: whether an image that cannot be used is an error.
        workers: number of processes that decode and encode.

    Raises:
        FileNotFoundError, ValueError: the source, the features or the folder cannot be used (see
            `originals.recognise` and `feature_files.attach`); with `strict`, also an image.
        Taken: another process is preparing a dataset in the folder.
        OSError: a file cannot be read or written.
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
            del settings['image']['crop']  # as written by versions with torchvision's rule only
        _check_same(folder, before, settings)
    per_shard = images_per_shard(found.size, found.channels)
    plans = {key: _plan(settings, part.identity, per_shard) for key, part in found.splits.items()}
    _check_notes(found.splits, strict)
    with lock.held(folder):
        if manifests.read(folder) != before:
            raise OSError(f'{folder} was prepared by another process in the meantime')
        _write(folder, settings, found, plans, before, strict, workers)


def _write(
    folder: epath.Path, settings: dict, found: originals.Originals, plans: dict[str, str],
    before: dict | None, strict: bool, workers: int,
) -> None:
    """Writes the missing parts of the folder; no other process may write to it."""
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
    for left in folder.glob('*.part'):  # left by a process that was killed
        left.unlink()


def _settings(found: originals.Originals, wanted: Wanted) -> dict[str, Any]:
    """Returns the settings that all splits share, except the kind, which follows from these."""
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
    if found.crop is not None:  # the key exists only for cropped images
        settings['image']['crop'] = found.crop
    if wanted.rotate:  # these two keys exist only if set
        settings['image']['rotated'] = 'as EXIF says'
    if wanted.background is not None:
        settings['image']['background'] = list(wanted.background)
    if found.features is not None:  # the key exists only with features
        settings['features'] = found.features
    return settings


def _check_place(folder: epath.Path, source: str) -> None:
    if not manifests.is_local(folder):
        return
    if folder.is_file():
        raise ValueError(f'--out {folder} is a file; choose a folder.')
    if folder.resolve().is_relative_to(os.path.realpath(source)):
        raise ValueError(
            f'--out {folder} is inside {source}, so its files would be read as images; choose a '
            'folder outside.'
        )


def _check_same(folder: epath.Path, before: dict, settings: dict) -> None:
    for key in (*settings, 'features'):
        has, wants = before.get(key), settings.get(key)
        if has != wants:
            if key == 'features':
                raise ValueError(
                    f'{folder} was prepared with {_columns(has)}, but this command has '
                    f'{_columns(wants)}; pass the same columns as --features, or another --out.'
                )
            if key == 'classes':  # too long to print; one of them is None
                has, wants = (v and 'labels' for v in (has, wants))
            remedy = ', or --name if it is the same dataset' if key == 'dataset' else ''
            raise ValueError(
                f'{folder} was prepared with {key} {has!r}, but this command has {wants!r}; choose '
                f'another --out{remedy}.'
            )


def _columns(features: list[str] | None) -> str:
    if features is None:
        return 'no features'
    return f'{len(features)} features ({", ".join(features[:8])}{", ..." * (len(features) > 8)})'


def _plan(settings: dict, identity: str, per_shard: int) -> str:
    """Returns a digest of everything that determines the shards of a split."""
    image = settings['image']
    if image.get('crop') == 'torchvision':  # older versions, with this rule only, did not name it
        image = {key: value for key, value in image.items() if key != 'crop'}
    text = json.dumps([manifests.FORMAT, settings | {'image': image}, identity, per_shard])
    return hashlib.sha256(text.encode()).hexdigest()


def _check_notes(splits: dict[str, Split], strict: bool) -> None:
    for key, part in splits.items():
        for name, note in part.notes:
            log.info('%s: %s %s', key, name, note)
        if part.count == 0:
            raise ValueError(f'the split {key} has no files; choose another source.')
        if strict and part.problems:
            name, note = part.notes[-1]
            raise ValueError(
                f'the split {key} does not pass --strict: {name} {note}; fix it, or leave out '
                '--strict.'
            )


def _begin(folder: epath.Path, plans: dict[str, str], before: dict | None) -> None:
    """Records in the folder what is being written, or checks that it is what was started before.

    Raises:
        ValueError: the folder has another preparation, started or finished.
    """
    for key, entry in (before['splits'] if before else {}).items():
        if plans.get(key, entry.get('plan')) != entry.get('plan'):
            raise ValueError(
                f'{folder} already has the split {key!r} with other images or options; choose '
                'another --out.'
            )
    path = folder / manifests.PROGRESS / PLAN
    if path.exists():
        try:
            begun = json_files.read(path)
        except json_files.Damaged as error:
            place = path.parent if before else folder
            raise ValueError(
                f'{path} is damaged ({error}); delete {place} and run the same command again.'
            ) from error
        if begun != plans:
            raise ValueError(
                f'{folder} has an unfinished preparation with other images or options; run that '
                f'command again, choose another --out, or delete {path.parent}.'
            )
        return
    if before is None and folder.exists():
        if any(entry.name not in (manifests.PROGRESS, lock.FILE) for entry in folder.iterdir()):
            raise ValueError(f'--out {folder} has other files; choose an empty or new folder.')
    path.parent.mkdir(parents=True, exist_ok=True)
    manifests.replace(path, json.dumps(plans))


def _write_rest(folder, key: str, places: dict, write, strict: bool, progress) -> list[dict]:
    """Writes the unfinished shards; returns the records of all shards, in order."""
    kept = shards.finished(folder, list(places))
    if kept:
        log.info('%s: keeping %d of %d shards, which are finished', key, len(kept), len(places))
    for name, shard in kept.items():
        _check_skipped(name, shard['skipped'], strict)
        progress.update(places[name][1] - places[name][0])
    told = kept | write({name: place for name, place in places.items() if name not in kept})
    if not any(shard['records'] for shard in told.values()):
        raise ValueError(f'the split {key} has no usable image; see the messages above.')
    return [told[name] for name in places]


def _mend(folder, key: str, entry: dict, places: dict, write, strict: bool, progress) -> None:
    """Rewrites the damaged shards of a finished split."""
    if [shard['name'] for shard in entry['shards']] != list(places):
        raise ValueError(
            f'{folder / manifests.FILE} is damaged (it names other shards of {key}); delete '
            f'{folder} and prepare the dataset again.'
        )
    _check_skipped(key, entry['skipped']['list'], strict)
    damaged = manifests.damage(folder, entry['shards'], contents=True)
    for name, wrong in damaged.items():
        log.warning('%s %s; it will be written again', name, wrong)
    progress.update(sum(b - a for name, (a, b) in places.items() if name not in damaged))
    wanted = {shard['name']: shard['sha256'] for shard in entry['shards']}
    write({name: places[name] for name in damaged}, wanted=wanted)


def _check_skipped(where: str, skipped: list, strict: bool) -> None:
    if strict and skipped:
        name, reason = skipped[0]
        raise ValueError(
            f'{name} {reason}, and was skipped in {where} before; fix or remove it and choose '
            'another --out, or leave out --strict.'
        )


def _entry(key: str, part: Split, plan: str, told: list[dict]) -> dict[str, Any]:
    """Returns the manifest's entry for a split."""
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
    """Logs how many images have each of the common notes."""
    counts = collections.Counter(note for shard in told for _, note in shard['notes'])
    for note in COUNTED:
        if counts[note]:
            log.warning('%s: %d of %d images: each %s', key, counts[note],
                        sum(shard['records'] for shard in told), note)


if __name__ == '__main__':
    sys.exit(main(sys.argv))
