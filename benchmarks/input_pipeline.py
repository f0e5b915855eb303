"""Times dataset preparation and the training pipeline: `python benchmarks/input_pipeline.py`.

The images are synthetic and photo-like, smooth with a little noise, so that JPEG and PNG take about
as long as for photographs. It prints one line of JSON per measurement. Rates are images per second,
over all cores (`prepare`) or of the whole pipeline (`read`), and per busy core, from the CPU
seconds of this process and its children. `--official=CHECKOUT` also reads the same 64x64 images
through the official code's dataset of PNG files, with the same number of workers.
"""

import argparse
import json
import logging
import os
import pickle
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tarflow_jax.data import pipeline, prepare, sources
from tarflow_jax.data.cores import available_cores

SIZE = 64
PHOTO_SIZE = (375, 500)
DISTINCT = 64


def photo_like(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Returns uint8 [height, width, 3]: noise at every scale, mostly coarse."""
    image_HxWxC = 128 + rng.normal(0, 3, (height, width, 3))
    for cells in (2, 4, 8, 16, 32):
        for channel in range(3):
            coarse = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
            fine = coarse.resize((width, height), Image.Resampling.BICUBIC)
            image_HxWxC[..., channel] += 100 / cells**0.7 * np.asarray(fine)
    return np.clip(image_HxWxC, 0, 255).astype(np.uint8)


def write_batch_file(folder: Path, count: int) -> None:
    """Writes a val_data like that of the ImageNet site."""
    rng = np.random.default_rng(0)
    distinct = np.stack([photo_like(rng, SIZE, SIZE) for _ in range(DISTINCT)])
    image_NxCxHxW = distinct[np.arange(count) % DISTINCT].transpose(0, 3, 1, 2)
    labels = rng.integers(1, 1001, count).tolist()
    with open(folder / 'val_data', 'wb') as file:
        pickle.dump({'data': image_NxCxHxW.reshape(count, -1), 'labels': labels}, file)


def write_photographs(folder: Path, count: int) -> None:
    """Writes JPEG files in two class folders."""
    rng = np.random.default_rng(1)
    for name in ('cat', 'dog'):
        (folder / name).mkdir()
    for i in range(min(count, DISTINCT)):
        image = Image.fromarray(photo_like(rng, *PHOTO_SIZE))
        image.save(folder / 'cat' / f'{i:06d}.jpg', quality=92)
    for i in range(DISTINCT, count):
        os.link(folder / 'cat' / f'{i % DISTINCT:06d}.jpg', folder / 'dog' / f'{i:06d}.jpg')


def write_archives(photographs: Path, archive: Path, rows: Path) -> None:
    """Writes the same photographs to a compressed zip and to a parquet file."""
    import pyarrow
    import pyarrow.parquet

    shutil.make_archive(str(archive.with_suffix('')), 'zip', photographs)
    paths = sorted(photographs.rglob('*.jpg'))
    labels = [path.parent.name for path in paths]
    # Append a number to each, because equal images would be stored once.
    images = [path.read_bytes() + b'%d' % k for k, path in enumerate(paths)]
    pyarrow.parquet.write_table(pyarrow.table({'image': images, 'label': labels}), rows)


def write_pictures(folder: Path, count: int) -> None:
    """Writes PNG files in one class folder, in the official code's layout of ImageNet64."""
    rng = np.random.default_rng(0)
    (folder / 'imagenet64/one').mkdir(parents=True)
    for i in range(count):
        path = folder / f'imagenet64/one/{i:06d}.png'
        if i < DISTINCT:
            Image.fromarray(photo_like(rng, SIZE, SIZE)).save(path)
        else:
            os.link(folder / f'imagenet64/one/{i % DISTINCT:06d}.png', path)


def cpu_seconds() -> float:
    # This covers only children that have ended.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measured(what: str, count: int, seconds: float, cpu: float, **about) -> None:
    print(json.dumps({
        'what': what, **about, 'images': count, 'seconds': round(seconds, 2),
        'images_per_second': round(count / seconds), 'images_per_core_second': round(count / cpu),
        'cores': available_cores(),
    }), flush=True)


def time_preparation(what: str, source: Path, out: Path, count: int, workers: int, split) -> None:
    start, cpu = time.perf_counter(), cpu_seconds()
    prepare.prepare(str(source), str(out), size=SIZE, split=split, workers=workers)
    measured(
        'prepare', count, time.perf_counter() - start, cpu_seconds() - cpu, of=what,
        workers=workers,
    )


def time_reading(folder: Path, batch_size: int, batches: int, workers: int) -> None:
    source = sources.load('prepared', 'validation', path=str(folder))
    before = cpu_seconds()
    iterator = pipeline.train_batches(
        source, batch_size=batch_size, seed=0, flip=True, workers=workers
    )
    next(iterator)  # threads or workers are running now
    start, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - start
    iterator.close()
    # The CPU time of workers is known after they end, and includes their start.
    cpu = cpu_seconds() - (before if workers else cpu)
    measured(
        'read', batch_size * batches, seconds, cpu, batch=batch_size, workers=workers,
        flip=True,
    )


def time_official(checkout: str, folder: Path, batch_size: int, batches: int, workers: int) -> None:
    sys.path.insert(0, checkout)
    import torch
    import utils

    write_pictures(folder, batch_size * (batches + 2 * workers + 1))
    data, _ = utils.get_data('imagenet64', SIZE, folder)
    before = cpu_seconds()
    iterator = iter(torch.utils.data.DataLoader(
        data, batch_size=batch_size, shuffle=True, num_workers=workers, drop_last=True
    ))
    next(iterator)
    start = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - start
    del iterator  # ends the workers
    measured(
        'read', batch_size * batches, seconds, cpu_seconds() - before, batch=batch_size,
        workers=workers, flip=True, reader='official',
    )


def time_source(folder: Path, count: int) -> None:
    source = sources.load('prepared', 'validation', path=str(folder))
    order = np.random.default_rng(0).integers(0, len(source), count)
    start, cpu = time.perf_counter(), cpu_seconds()
    for i in order:
        source[int(i)]
    measured('source', count, time.perf_counter() - start, cpu_seconds() - cpu, reader='ours')


def time_tfds(folder: Path, count: int) -> None:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(folder).as_data_source('validation')
    order = np.random.default_rng(0).integers(0, len(source), count)
    start, cpu = time.perf_counter(), cpu_seconds()
    for i in order:
        source[int(i)]
    measured('source', count, time.perf_counter() - start, cpu_seconds() - cpu, reader='tfds')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--images', type=int, default=20_000, help='64x64 images to prepare')
    parser.add_argument('--photographs', type=int, default=2_000, help='500x375 JPEGs to prepare')
    parser.add_argument('--batch', type=int, default=256)
    parser.add_argument('--batches', type=int, default=100, help='to read, of the training set')
    parser.add_argument('--workers', type=int, default=available_cores())
    parser.add_argument('--official', help='a checkout of github.com/apple/ml-tarflow to compare with')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ('batches', 'photographs'):
            (folder / name).mkdir()
        write_batch_file(folder / 'batches', args.images)
        write_photographs(folder / 'photographs', args.photographs)
        prepared = folder / 'prepared'
        time_preparation(
            'batch file', folder / 'batches', prepared, args.images, args.workers, None
        )
        time_preparation(
            '500x375 JPEG', folder / 'photographs', folder / 'small', args.photographs,
            args.workers, 'train',
        )
        archive, rows = folder / 'photographs.zip', folder / 'photographs.parquet'
        write_archives(folder / 'photographs', archive, rows)
        for source in (archive, rows):
            time_preparation(
                f'500x375 JPEG in {source.suffix}', source, folder / f'small{source.suffix}',
                args.photographs, args.workers, 'train',
            )
        time_source(prepared, 5_000)
        time_tfds(prepared, 5_000)
        for workers in (0, 1, 2):
            time_reading(prepared, args.batch, args.batches, workers)
            if args.official and workers:
                pictures = folder / f'pictures_{workers}'
                time_official(args.official, pictures, args.batch, args.batches, workers)


if __name__ == '__main__':
    main()
