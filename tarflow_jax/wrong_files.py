"""Recognises files that were passed in the wrong place, and tells where they belong."""

import zipfile
from pathlib import Path

_PREPARE = 'to train on it, run python -m tarflow_jax.data.prepare FILE --out=DIR'
_STATISTICS = 'pass it in evaluate.frechet.references'
_SAMPLES = 'pass it as evaluate.frechet.samples'
_STARTS = (
    (b'version https://git-lfs', 'is a pointer of Git LFS; run git lfs pull to get the file'),
    (b'<', 'is a web page, perhaps from a failed download; download the file again'),
    (b'PAR1', f'is a parquet file, possibly of images; {_PREPARE}'),
    (b'\x89PNG', f'is an image; {_PREPARE} with a folder of images'),
    (b'\xff\xd8\xff', f'is an image; {_PREPARE} with a folder of images'),
    (b'\x1f\x8b', 'is compressed by gzip; unpack it'),
    (b'\x89HDF', 'is an HDF5 file, which is not supported'),
    (b'\x00\x00\x08\x03', f'is an IDX file of images; {_PREPARE} with its folder'),
)
# Members that identify an .npz archive.
_ARRAYS = (
    ({'mu', 'sigma'}, f'has statistics of features; {_STATISTICS}'),
    ({'data', 'labels'}, f"is a batch of the ImageNet site's images; {_PREPARE}"),
    ({'arr_0'}, f'has samples or images in the layout of the ADM suite; {_SAMPLES}'),
)
# Text in the first bytes of the pickles of image datasets.
_BATCHES = (b'batch_label', b'fine_labels', b'coarse_label', b'filenames', b'data', b'labels')


def described(path) -> str | None:
    """Describes a file with its remedy, such as 'is a parquet file, ...; ...'; None if unknown."""
    path = Path(path)
    if path.is_dir():
        return _of_folder(path)
    with path.open('rb') as file:
        start = file.read(4096)
    if start.startswith(b'PK'):
        return _of_zip(path)
    if start.startswith(b'\x80'):
        if any(word in start for word in _BATCHES):
            return f'is a pickled batch of images (CIFAR or the ImageNet site); {_PREPARE}'
        return (
            'is a pickle, which is a program and is not executed here; save the state dict with '
            'torch.save(model.state_dict(), path)'
        )
    if start[257:262] == b'ustar':
        return f'is a tar archive; unpack it, or {_PREPARE}'
    return next((says for magic, says in _STARTS if start.startswith(magic)), None)


def _of_folder(path: Path) -> str | None:
    if (path / 'checkpoints').is_dir() or path.name == 'checkpoints':
        run = path if (path / 'checkpoints').is_dir() else path.parent
        return f'is the folder of a run; pass --workdir={run}'
    if (path / 'manifest.json').is_file():
        return (
            'is a prepared dataset; pass --config.data.source=prepared '
            f'--config.data.path={path}'
        )
    return None


def _of_zip(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return None
    if any(name.endswith('/data.pkl') for name in names):
        return 'is a file of torch.save; if it is a checkpoint, pass it as --input'
    arrays = {name.removesuffix('.npy') for name in names}
    return next((says for wanted, says in _ARRAYS if wanted <= arrays), None)
