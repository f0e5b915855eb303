"""Small sets of images as people have them, the command that prepares them, and what comes out."""

import hashlib
import io
import json
import pickle
import tarfile

import numpy as np
from PIL import Image

from tarflow_jax.data import prepare, sources

SIZE = 8


def picture(seed, shape=(SIZE, SIZE, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, **options)


def encoded(image, kind='PNG'):
    data = io.BytesIO()
    Image.fromarray(image).save(data, kind)
    return data.getvalue()


def run(source, out, *more, code=0):
    argv = ['prepare', str(source), f'--out={out}', '--workers=2', *more]
    assert prepare.main(argv) == code


def manifest(out):
    return json.loads((out / 'manifest.json').read_text())


def content(out):
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.rglob('*') if path.is_file()
    }


def elements(out, split):
    """All images and labels, read by us and by TFDS, which must agree, on features too."""
    import tensorflow_datasets as tfds

    ours = sources.load('prepared', split, path=str(out))
    theirs = tfds.builder_from_directory(str(out)).as_data_source(split)
    assert len(ours) == len(theirs)
    read = [ours[i] for i in range(len(ours))]
    for i, element in enumerate(read):
        np.testing.assert_array_equal(element['image'], theirs[i]['image'])
        assert element['label'] == theirs[i].get('label', -1)
        assert element['image'].dtype == np.uint8 and element['label'].dtype == np.int32
        assert ('features' in element) == ('features' in theirs[i])
        if 'features' in element:
            np.testing.assert_array_equal(element['features'], theirs[i]['features'])
            assert element['features'].dtype == theirs[i]['features'].dtype == np.float32
    return np.stack([e['image'] for e in read]), [int(e['label']) for e in read]


def write_batches(folder, count=3):
    """A folder as the ImageNet site serves it."""
    folder.mkdir()
    for k, name in enumerate([f'train_data_batch_{k}' for k in range(1, 11)] + ['val_data']):
        data = np.stack([picture(10 * k + i).transpose(2, 0, 1).ravel() for i in range(count)])
        (folder / name).write_bytes(pickle.dumps({'data': data, 'labels': [1000, k + 1, 1]}))
    rows = [f'n{k:08d} {k} thing' for k in range(1, 1001)]
    (folder / 'map_clsloc.txt').write_text('\n'.join(rows))


def pack(folder, path, name='.'):
    with tarfile.open(path, 'w') as tar:
        tar.add(folder, name)
    return path


def last_error(capfd):
    """The sentence that the command ended with, which must be one line."""
    said = capfd.readouterr().err.rpartition('error: ')[2]
    assert said.count('\n') == 1 and said.endswith('.\n')
    return said
