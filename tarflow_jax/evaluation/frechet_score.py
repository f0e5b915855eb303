"""The score `frechet`: distances to reference statistics, precision and recall."""

from collections.abc import Callable

import numpy as np

from tarflow_jax import paths
from tarflow_jax.data import kinds
from tarflow_jax.evaluation import features, networks, sample_files, statistics_files
from tarflow_jax.evaluation.frechet import Statistics, frechet_distance
from tarflow_jax.evaluation.precision_recall import precision_recall
from tarflow_jax.training.over_set import evenly_spaced

# Published names of the references of the Frechet distance.
CONVENTIONS = {
    'train_flipped': 'training set, half of it mirrored (official TarFlow code)',
    'train': 'training set (EDM; ADM where the whole set is its reference)',
}
FORMATS = {
    'adm': 'file of the ADM suite',
    'edm': 'file of the EDM suite',
    'torchmetrics': 'file of torchmetrics',
    'tarflow_jax': 'file of tarflow_jax',
}
# The crop rule of the images in the files of each suite.
CROPS = {'adm': f'{kinds.PHOTOGRAPHS}/adm', 'edm': f'{kinds.PHOTOGRAPHS}/edm'}
NEIGHBOURS = 5  # k of density and coverage; precision and recall use 3


def prepare(s) -> Callable:
    """Prepares the score of this name; `s` is a `scores.Subject`."""
    f = s.config.evaluate.frechet
    network = networks.load(f.network, f.weights)
    train = s.train()
    given = {name: statistics_files.read(name) for name in f.references if name not in CONVENTIONS}
    for name, reference in given.items():
        if reference.mean.size != network.about['feature_size']:
            raise ValueError(
                f'evaluate.frechet.references {name} has statistics of {reference.mean.size} '
                f'features, but {network.name} has {network.about["feature_size"]}; choose the '
                'evaluate.frechet.network that computed them.'
            )
    ready = sample_files.open_samples(f.samples) if f.samples else None
    if ready is not None and ready[0]['image'].shape != train[0]['image'].shape:
        raise ValueError(
            f'evaluate.frechet.samples {f.samples} has images {list(ready[0]["image"].shape)}, '
            f'but the training set has {list(train[0]["image"].shape)}; choose samples and a '
            'dataset of one size.'
        )
    count = s.config.sample.count if ready is None else len(ready)
    keep = min(f.neighbours, count, len(train))
    if keep <= NEIGHBOURS:
        raise ValueError(
            f'evaluate.frechet.neighbours {f.neighbours} with {count} samples and {len(train)} '
            f'training images leaves {keep} of each, too few for {NEIGHBOURS} neighbours; use '
            'more.'
        )
    folder = paths.writable_folder(
        f.statistics or s.workdir / 'statistics', f'evaluate.frechet.statistics {f.statistics}'
    )
    options = dict(mesh=s.mesh, batch_size=f.batch_size)

    def work(_, draw_samples) -> dict:
        samples, drawn = draw_samples() if ready is None else (ready, {'path': f.samples})
        generated, near = features.statistics_and_features(
            network, samples, keep=keep, about={}, what='samples', **options
        )
        floor = features.statistics_of(
            network, evenly_spaced(s.test, len(samples)), about={}, what='test set', **options
        )
        rows = []
        for name in f.references:
            reference = given.get(name) or features.cached_statistics(
                folder, network, train, flip=name == 'train_flipped', seed=s.config.seed,
                what=name, **options,
            )
            rows.append(_distances(name, generated, floor, reference, train.about.get('kind')))
        real = np.concatenate([
            found['pooled'] for found in features.features_of(
                network, evenly_spaced(train, keep), what='training set', **options
            )
        ])
        return {
            'network': network.about,
            'is_fid': network.is_fid,
            'samples': len(samples),
            'samples_from': str(drawn['path']),
            'pixels': 'rounded to the nearest of 256 levels',
            'distances': rows,
            'neighbours': {'images_of_each': keep} | precision_recall(real, near),
        }

    return work


def _distances(
    name: str, generated: Statistics, floor: Statistics, reference: Statistics, trained: str | None
) -> dict:
    kind = CONVENTIONS.get(name) or FORMATS[reference.about['format']]
    row = {
        'reference': name,
        'convention': kind,
        'reference_images': reference.count,
        'reference_about': reference.about,
        'distance': frechet_distance(generated, reference),
        'real_floor': frechet_distance(floor, reference),
        'real_floor_images': floor.count,
    }
    if reference.spatial is not None and generated.spatial is not None:
        row['spatial_distance'] = frechet_distance(generated.spatial, reference.spatial)
    note = None if name in CONVENTIONS else _other_crop(reference.about, trained)
    return row | ({'note': note} if note else {})


def _other_crop(about: dict, trained: str | None) -> str | None:
    """Returns a warning if the images of a file have another crop than the training set."""
    theirs, whose = CROPS.get(about['format']), 'files of this suite'
    source = about.get('source', {})
    if 'preprocessing' in source:  # a prepared dataset
        theirs = kinds.of_manifest(source | {'kind': kinds.of_set(source | {'classes': None})})
        whose = 'the file'
    of_photographs = {kinds.PHOTOGRAPHS, kinds.BOX_RESIZED, kinds.DOWNSAMPLED}
    if theirs == trained or not {kinds.plain(theirs), kinds.plain(trained)} <= of_photographs:
        return None
    return (
        f'the training set has {kinds.described(trained)}, {whose} {kinds.described(theirs)}: '
        'the distance includes this difference'
    )


def rows(r: dict) -> list[tuple[str, str]]:
    """Returns the rows of the printed table."""
    network = r['network']
    name = f'Frechet distance, {network["name"]} (not FID)'
    if r['is_fid']:
        name = 'FID' if network['published_weights'] else 'FID with weights of another checksum'
    found = [('samples', f'{r["samples"]}, {r["samples_from"]}; pixels {r["pixels"]}')]
    for one in r['distances']:
        against = one['convention']
        if one['reference_images']:
            against += f', {one["reference_images"]} images'
        floor = f'{one["real_floor_images"]} real test images: {one["real_floor"]:.3f}'
        found.append((name, f'{one["distance"]:.3f} to the {against}  ({floor})'))
        if 'spatial_distance' in one:
            found.append(('sFID', f'{one["spatial_distance"]:.3f} to the {against}'))
        if 'note' in one:
            found.append(('caution', one['note']))
    n = r['neighbours']
    found.append(('precision, recall (k = 3)', f'{n["precision"]:.4f}, {n["recall"]:.4f}  '
                 f'({n["images_of_each"]} images of each)'))
    found.append(('density, coverage (k = 5)', f'{n["density"]:.4f}, {n["coverage"]:.4f}'))
    return found
