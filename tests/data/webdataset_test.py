"""WebDataset shards: files of one stem are one sample, and the shards no classes."""

import io
import json
import tarfile

import numpy as np
import pytest
from prepared_pictures import elements, encoded, last_error, manifest, picture, run

pytestmark = pytest.mark.usefixtures('in_threads')


def write_shard(path, samples):
    """A tar of {name: content}, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as tar:
        for name, content in samples.items():
            content = content if isinstance(content, bytes) else str(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(numbers, label=lambda k: {'cls': k % 3}, **more):
    return {
        f'sample{k:03d}.{kind}': value for k in numbers
        for kind, value in {'png': encoded(picture(k)), **label(k), **more}.items()
    }


def test_shards_of_splits(tmp_path):
    folder = tmp_path / 'pets'
    for name, numbers in (('train-000000', range(4)), ('train-000001', range(4, 8)), ('val-000000', range(8, 10))):
        write_shard(folder / f'pets-{name}.tar', samples(numbers, txt='a caption', json={'a': 1}))
    run(folder, tmp_path / 'out', '--size=8')
    images, labels = elements(tmp_path / 'out', 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in range(8)])
    assert labels == [k % 3 for k in range(8)]
    assert elements(tmp_path / 'out', 'validation')[1] == [2, 0]
    made = manifest(tmp_path / 'out')
    assert made['classes'] == ['0', '1', '2'] and made['dataset'] == 'pets'
    assert made['splits']['train']['notes']['count'] == 0


@pytest.mark.parametrize('label, classes, labels', [
    (lambda k: {'json': json.dumps({'label': k % 2, 'width': 8})}, ['0', '1'], [0, 1, 0, 1]),
    (lambda k: {'cls': f'n{9 - k}\n'}, ['n6', 'n7', 'n8', 'n9'], [3, 2, 1, 0]),
    (lambda k: {'json': json.dumps({'caption': 'a train'})}, None, [-1] * 4),
    (lambda k: {'txt': 'a train'}, None, [-1] * 4),
])
def test_kinds_of_labels(tmp_path, label, classes, labels):
    write_shard(tmp_path / 'shards' / '00000.tar', samples(range(4), label))
    for source in (tmp_path / 'shards', tmp_path / 'shards' / '00000.tar'):
        out = tmp_path / f'out-{source.name}'
        run(source, out, '--size=8', '--split=train')
        assert manifest(out)['classes'] == classes and elements(out, 'train')[1] == labels


@pytest.mark.parametrize('content, says', [
    ({'a.png': b'x', 'a.cls': 3, 'b.png': b'x'}, 'has 00000/b.png without a .cls or .json'),
    ({'a.png': b'x', 'a.cls': -3}, 'has a damaged 00000/a.cls (the label is'),
    ({'a.png': b'x', 'a.cls': ''}, 'has a damaged 00000/a.cls (the label is'),
    ({'a.png': b'x', 'a.cls': b'\xff'}, 'has a damaged 00000/a.cls ('),
    ({'a.png': b'x', 'a.json': '{"label": [1]}'}, 'has a damaged 00000/a.json (the label is'),
    ({'a.png': b'x', 'a.json': '{"label": 1}', 'b.png': b'x', 'b.json': '{}'}, 'has 00000/b.png without a class'),
    ({'a.png': b'x', 'a.json': '[' * 10**5}, 'has a damaged 00000/a.json ('),
    ({'a.png': b'x', 'a.cls': 1, 'b.png': b'x', 'b.cls': 'cat'}, 'both names and numbers as labels'),
])
def test_labels_that_are_refused(tmp_path, content, says, capfd):
    write_shard(tmp_path / 'shards' / '00000.tar', content)
    run(tmp_path / 'shards', tmp_path / 'out', '--size=8', '--split=train', code=2)
    assert says in last_error(capfd)


def test_tars_beside_other_images_are_folders(tmp_path):
    write_shard(tmp_path / 'train' / 'dog.tar', samples(range(2)))
    (tmp_path / 'train' / 'cat').mkdir()
    (tmp_path / 'train' / 'cat' / '1.png').write_bytes(encoded(picture(9)))
    run(tmp_path / 'train', tmp_path / 'out', '--size=8')
    assert manifest(tmp_path / 'out')['classes'] == ['cat', 'dog']
    assert elements(tmp_path / 'out', 'train')[1] == [0, 1, 1]


def test_shards_of_which_only_some_say_their_split(tmp_path, capfd):
    for name in ('train-0', 'other-1'):
        write_shard(tmp_path / 'shards' / f'{name}.tar', samples(range(2)))
    run(tmp_path / 'shards', tmp_path / 'out', '--size=8', code=2)
    assert 'whose name has no split' in last_error(capfd)
