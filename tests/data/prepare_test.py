"""Preparation: every kind of source comes out as it went in, and what is wrong with it is said."""

import hashlib
import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image
from prepared_pictures import (
    content,
    elements,
    last_error,
    manifest,
    pack,
    picture,
    run,
    save,
    write_batches,
)

from tarflow_jax.data import cropping, prepare, sources
from tarflow_jax.data.idx import write_idx

pytestmark = pytest.mark.usefixtures('in_threads')


def test_class_folders(classes, tmp_path, capfd):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    images, labels = elements(out, 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in range(6)])
    assert labels == [0, 0, 0, 0, 1, 1]
    images, labels = elements(out, 'validation')
    np.testing.assert_array_equal(images, [picture(k) for k in range(6, 9)])
    assert labels == [0, 1, 1]
    made = manifest(out)
    assert made['dataset'] == 'pets' and made['classes'] == ['cat', 'dog']
    assert made['image'] == {'size': 8, 'channels': 3, 'encoding': 'png', 'crop': 'torchvision'}
    assert made['preprocessing'].startswith('short side resized to 8 pixels, bilinear')
    assert not (out / 'progress').exists()
    text = (out / 'manifest.json').read_text() + (out / 'dataset_info.json').read_text()
    assert str(tmp_path) not in text
    assert 'train 6 images in 1 shard(s), 0 skipped' in capfd.readouterr().err


def test_a_second_time_nothing_is_done(classes, tmp_path, capfd):
    out = tmp_path / 'out'
    run(classes, out, '--size=8')
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    run(classes, out, '--size=8')
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert 'already prepared' in capfd.readouterr().err


@pytest.mark.parametrize('name', ['.', 'pets', 'data/pets'])
def test_tar_equals_folder(classes, tmp_path, name):
    run(classes, tmp_path / 'a', '--size=8')
    run(pack(classes, tmp_path / 'pets.tar', name), tmp_path / 'b', '--size=8')
    for split in ('train', 'validation'):
        for a, b in zip(elements(tmp_path / 'a', split), elements(tmp_path / 'b', split)):
            np.testing.assert_array_equal(a, b)


def test_tar_of_class_tars(tmp_path):
    inside = tmp_path / 'inside'
    for k in range(4):
        save(tmp_path / f'n{k % 2}' / f'{k}.png', picture(k))
    inside.mkdir()
    for k in range(2):
        pack(tmp_path / f'n{k}', inside / f'n{k}.tar')
    with tarfile.open(tmp_path / 'ILSVRC2012_img_train.tar', 'w') as tar:
        for k in range(2):
            tar.add(inside / f'n{k}.tar', f'n{k}.tar')
    run(tmp_path / 'ILSVRC2012_img_train.tar', tmp_path / 'out', '--size=8', '--name=imagenet')
    images, labels = elements(tmp_path / 'out', 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in (0, 2, 1, 3)])
    assert labels == [0, 0, 1, 1]
    assert manifest(tmp_path / 'out')['classes'] == ['n0', 'n1']


@pytest.mark.parametrize('as_tar', [False, True])
def test_older_imagenet64(tmp_path, as_tar):
    folder = tmp_path / 'files'
    for k in range(3):
        save(folder / 'train_8x8' / f'{k:04d}.png', picture(k))
    save(folder / 'valid_8x8' / '0001.png', picture(9))
    save(folder / 'train_8x8' / '9999.png', picture(0, (9, 8, 3)))
    if as_tar:
        for name in ('train_8x8', 'valid_8x8'):
            pack(folder / name, folder / f'{name}.tar', name)
            shutil.rmtree(folder / name)
    out = tmp_path / 'out'
    run(folder, out)
    images, labels = elements(out, 'train')
    np.testing.assert_array_equal(images, [picture(k) for k in range(3)])
    assert labels == [-1, -1, -1]
    np.testing.assert_array_equal(elements(out, 'validation')[0], [picture(9)])
    made = manifest(out)
    assert made['dataset'] == 'downsampled_imagenet/8x8' and made['classes'] is None
    (name, reason), = made['splits']['train']['skipped']['list']
    assert name.endswith('9999.png') and reason == 'is 8x9, not 8x8'
    features = json.loads((out / 'features.json').read_text())['featuresDict']['features']
    assert list(features) == ['image']


@pytest.mark.parametrize('name', ['.', 'train_8x8'])
def test_one_split_of_older_imagenet64(tmp_path, name):
    folder = tmp_path / 'files' / 'train_8x8'
    save(folder / '1.png', picture(1))
    run(folder, tmp_path / 'a')
    run(pack(folder, tmp_path / 'train_8x8.tar', name), tmp_path / 'b')
    for out in (tmp_path / 'a', tmp_path / 'b'):
        np.testing.assert_array_equal(elements(out, 'train')[0], [picture(1)])
        assert manifest(out)['dataset'] == 'downsampled_imagenet/8x8'


def test_batch_files(tmp_path, small_shards):
    write_batches(tmp_path / 'files')
    out = tmp_path / 'out'
    run(tmp_path / 'files', out)
    images, labels = elements(out, 'train')
    wanted = [picture(10 * k + i) for k in range(10) for i in range(3)]
    np.testing.assert_array_equal(images, wanted)
    assert labels == [label for k in range(10) for label in (999, k, 0)]
    assert elements(out, 'validation')[1] == [999, 10, 0]
    made = manifest(out)
    assert made['dataset'] == 'imagenet_resized/8x8 (box-resized, ImageNet site)'
    assert made['classes'][999] == 'n00001000'
    shards = made['splits']['train']['shards']
    assert [shard['records'] for shard in shards] == [2] * 15
    for shard in shards:
        data = (out / shard['name']).read_bytes()
        assert len(data) == shard['bytes']
        assert hashlib.sha256(data).hexdigest() == shard['sha256']


def test_idx(tmp_path):
    folder = tmp_path / 'digits'
    folder.mkdir()
    images, labels = picture(0, (5, 6, 6)), np.array([3, 0, 1, 2, 3], np.uint8)
    for split in ('train', 't10k'):
        write_idx(folder / f'{split}-images-idx3-ubyte.gz', images)
        write_idx(folder / f'{split}-labels-idx1-ubyte.gz', labels)
    run(folder, tmp_path / 'out')
    got = elements(tmp_path / 'out', 'test')
    np.testing.assert_array_equal(got[0], images[..., None])
    assert got[1] == [3, 0, 1, 2, 3]
    run(folder, tmp_path / 'larger', '--size=12', '--split=train')
    assert elements(tmp_path / 'larger', 'train')[0].shape == (5, 12, 12, 1)
    assert list(manifest(tmp_path / 'larger')['splits']) == ['train']


@pytest.mark.parametrize('options, plan', [
    ([], '66f5341d15ef7c1e98103a505f42846325ae31798e9999c999392527e9a084b2'),
    (['--size=12'], '631eaac72e9e80d738dd95788a8e6006fa28a2ca0f668e365680839fa7eb3c74'),
])
def test_what_the_first_version_began_goes_on(tmp_path, options, plan):
    # A plan of its, and so its settings, as the first version wrote them.
    folder = tmp_path / 'digits'
    folder.mkdir()
    images = np.arange(5 * 6 * 6, dtype=np.uint8).reshape(5, 6, 6)
    write_idx(folder / 'train-images-idx3-ubyte', images)
    write_idx(folder / 'train-labels-idx1-ubyte', np.array([3, 0, 1, 2, 3], np.uint8))
    run(folder, tmp_path / 'out', *options)
    made = manifest(tmp_path / 'out')
    assert made['splits']['train']['plan'] == plan
    assert list(made) == [
        'format', 'dataset', 'tfds_name', 'image', 'preprocessing', 'classes', 'kind', 'splits'
    ]


@pytest.mark.parametrize('kind', ['photographs', 'imagenet_resized', 'downsampled_imagenet', 'idx'])
def test_a_manifest_of_the_first_version_is_already_prepared(classes, tmp_path, kind, capfd):
    source, options = {
        'photographs': (classes, ['--size=8', '--name=mine']),
        'imagenet_resized': (tmp_path / 'files', ['--name=mine', '--split=validation']),
        'downsampled_imagenet': (tmp_path / 'older', ['--split=train']),
        'idx': (tmp_path / 'digits', ['--size=12']),
    }[kind]
    if kind == 'imagenet_resized':
        write_batches(source)
    if kind == 'downsampled_imagenet':
        save(source / 'train_8x8' / '1.png', picture(1))
    if kind == 'idx':
        source.mkdir()
        write_idx(source / 'train-images-idx3-ubyte', picture(0, (2, 6, 6)))
        write_idx(source / 'train-labels-idx1-ubyte', np.array([1, 0], np.uint8))
    out = tmp_path / 'out'
    run(source, out, *options)
    made = manifest(out)
    assert made.pop('kind') == kind
    (out / 'manifest.json').write_text(json.dumps(made))
    before = content(out)
    capfd.readouterr()
    run(source, out, *options)
    assert 'is already prepared' in capfd.readouterr().err and content(out) == before
    split, = [split for split in made['splits'] if split != 'train'] or ['train']
    crop = '/torchvision' * (kind == 'photographs')
    assert sources.load('prepared', split, path=str(out)).about['kind'] == f'{kind}{crop}'
    # Another split of it may still be added.
    if kind == 'imagenet_resized':
        run(source, out, '--name=mine')
        assert manifest(out)['kind'] == kind and len(manifest(out)['splits']) == 2


def test_rectangles(classes, tmp_path):
    out = tmp_path / 'out'
    run(classes, out, '--size=8x4')
    images, labels = elements(out, 'train')
    np.testing.assert_array_equal(images, [picture(k)[:, 2:6] for k in range(6)])
    assert labels == [0, 0, 0, 0, 1, 1]
    made = manifest(out)
    assert made['image'] == {
        'size': [8, 4], 'channels': 3, 'encoding': 'png', 'crop': 'torchvision'
    }
    assert made['preprocessing'] == (
        'resized, aspect kept, until both sides cover 8x4 (height x width) pixels, bilinear and '
        'antialiased (Pillow), then the middle 8x4 cut out'
    )
    before = content(out)
    run(classes, out, '--size=8x4')
    assert content(out) == before
    source = sources.load('prepared', 'train', path=str(out))
    sources.check(source, image_size=(8, 4), channels=3, num_classes=2, what='the training set')


def test_rectangular_idx(tmp_path, small_shards):
    folder = tmp_path / 'digits'
    folder.mkdir()
    images, labels = picture(0, (5, 6, 12)), np.array([3, 0, 1, 2, 3], np.uint8)
    write_idx(folder / 'train-images-idx3-ubyte', images)
    write_idx(folder / 'train-labels-idx1-ubyte', labels)
    run(folder, tmp_path / 'own')
    np.testing.assert_array_equal(elements(tmp_path / 'own', 'train')[0], images[..., None])
    made = manifest(tmp_path / 'own')
    assert made['image']['size'] == [6, 12] and made['preprocessing'] == 'none'
    # As many shards as the pixels, 6 x 12 of 2 x 8 x 8 x 3, ask for.
    assert len(made['splits']['train']['shards']) == 1
    run(folder, tmp_path / 'cut', '--size=6x8')
    np.testing.assert_array_equal(
        elements(tmp_path / 'cut', 'train')[0], images[:, :, 2:10, None]
    )
    assert len(manifest(tmp_path / 'cut')['splits']['train']['shards']) == 1


def test_sets_of_versions_without_other_crops_are_already_prepared(classes, tmp_path, capfd):
    out = tmp_path / 'out'
    run(classes, out, '--size=12')
    # As those versions wrote it; a test above holds that plans are theirs.
    text = (out / 'manifest.json').read_text()
    made = json.loads(text)
    assert made['image'].pop('crop') == 'torchvision'
    (out / 'manifest.json').write_text(json.dumps(made, indent=1, ensure_ascii=False) + '\n')
    before = content(out)
    run(classes, out, '--size=12')
    assert 'already prepared' in capfd.readouterr().err and content(out) == before
    run(classes, out, '--size=12', '--crop=edm', code=2)
    assert "with image {'size': 12, 'channels': 3, 'encoding': 'png'}, but" in last_error(capfd)
    save(classes / 'test' / 'cat' / '1.png', picture(1))
    run(classes / 'test', out, '--size=12')
    assert 'crop' not in manifest(out)['image'] and len(manifest(out)['splits']) == 3


def test_crops(classes, tmp_path, capfd):
    plans = set()
    for rule in cropping.RULES:
        out = tmp_path / rule
        run(classes, out, '--size=12', f'--crop={rule}')
        made = manifest(out)
        assert made['image']['crop'] == rule
        assert made['preprocessing'] == cropping.describe((12, 12), rule)
        wanted = [cropping.resize_and_crop(Image.fromarray(picture(k)), (12, 12), rule) for k in range(6)]
        np.testing.assert_array_equal(elements(out, 'train')[0], np.stack(wanted))
        plans.add(made['splits']['train']['plan'])
        run(classes, out, '--size=12', f'--crop={rule}')
        assert 'already prepared' in capfd.readouterr().err
    assert len(plans) == 3
    run(classes, tmp_path / 'edm', '--size=12', '--crop=adm', code=2)
    assert 'choose another --out' in last_error(capfd)
    run(classes, tmp_path / 'new', '--size=8x4', '--crop=edm', code=2)
    assert '--size is 8x4, but --crop=edm needs a square' in last_error(capfd)


def make_hostile(folder):
    good = picture(0, (20, 20, 3))
    save(folder / 'cat' / 'good.jpg', good)
    save(folder / 'cat' / 'cut.jpg', picture(0, (90, 90, 3)))
    os.truncate(folder / 'cat' / 'cut.jpg', 3000)
    (folder / 'cat' / 'words.jpg').write_text('hello')
    (folder / 'cat' / 'nothing.jpg').touch()
    Image.new('1', (20000, 20000)).save(folder / 'cat' / 'bomb.png')
    (folder / 'cat' / 'link.jpg').symlink_to('gone.jpg')
    Image.new('CMYK', (20, 20)).save(folder / 'cat' / 'print.jpg')
    save(folder / 'cat' / 'deep.png', picture(1, (20, 20)).astype(np.uint16) * 256)
    save(folder / 'cat' / 'dot.png', picture(1, (1, 1, 3)))
    (folder / 'cat' / '.hidden').write_text('hello')
    (folder / 'dog').mkdir()
    (folder / 'readme.txt').write_text('hello')


def test_hostile_files_are_named(tmp_path, capfd):
    folder, out = tmp_path / 'pets', tmp_path / 'out'
    make_hostile(folder)
    run(folder, out, '--size=8', '--split=train')
    entry = manifest(out)['splits']['train']
    assert entry['images'] == 4 and elements(out, 'train')[1] == [0] * 4
    assert manifest(out)['classes'] == ['cat', 'dog']
    skipped = dict(entry['skipped']['list'])
    assert entry['skipped']['count'] == 5
    assert skipped['cat/cut.jpg'].startswith('is damaged: image file is truncated')
    assert skipped['cat/words.jpg'].startswith('is not an image')
    assert skipped['cat/nothing.jpg'] == 'is empty'
    assert skipped['cat/bomb.png'].startswith('is a decompression bomb')
    assert skipped['cat/link.jpg'] == 'is a broken link or not a regular file'
    notes = dict(entry['notes']['list'])
    assert notes == {
        'readme.txt': 'is not in a class folder and was left out',
        'dog': 'is a class without files in this split; it keeps its label',
        'cat/print.jpg': 'is CMYK and was converted to RGB',
        'cat/deep.png': 'has 16 bits per channel, of which the upper 8 were kept',
        'cat/dot.png': 'is 1x1, smaller than 8x8, and was enlarged',
    }
    said = capfd.readouterr().err
    for name, text in (skipped | notes).items():
        assert f'{name} {text}' in said


def test_lists_in_the_manifest_are_capped(tmp_path, monkeypatch):
    make_hostile(tmp_path / 'pets')
    monkeypatch.setattr(prepare, 'MAX_LISTED', 2)
    run(tmp_path / 'pets', tmp_path / 'out', '--size=8', '--split=train')
    entry = manifest(tmp_path / 'out')['splits']['train']
    assert entry['skipped']['count'] == 5 and len(entry['skipped']['list']) == 2
    assert entry['notes']['count'] == 5 and len(entry['notes']['list']) == 2


def test_strict(classes, tmp_path, capfd):
    run(classes, tmp_path / 'good', '--size=8', '--strict')
    (classes / 'train' / 'cat' / 'words.jpg').write_text('hello')
    run(classes, tmp_path / 'out', '--size=8', '--strict', code=2)
    assert 'train/cat/words.jpg is not an image' in last_error(capfd)
    assert not (tmp_path / 'out' / 'manifest.json').exists()
    (classes / 'train' / 'cat' / 'words.jpg').unlink()
    (classes / 'train' / 'fish').mkdir()
    run(classes, tmp_path / 'other', '--size=8', '--strict', code=2)
    assert 'fish is a class without files' in last_error(capfd)


def test_strict_after_skipping(classes, tmp_path, capfd):
    (classes / 'train' / 'cat' / 'words.jpg').write_text('hello')
    run(classes, tmp_path / 'out', '--size=8')
    run(classes, tmp_path / 'out', '--size=8', '--strict', code=2)
    assert 'words.jpg is not an image' in last_error(capfd)


def test_a_second_split_extends(classes, tmp_path, capfd):
    run(classes, tmp_path / 'both', '--size=8')
    run(classes / 'train', tmp_path / 'out', '--size=8')
    shutil.rmtree(classes / 'val' / 'dog')
    run(classes / 'val', tmp_path / 'out', '--size=8')
    assert list(manifest(tmp_path / 'out')['splits']) == ['train', 'validation']
    np.testing.assert_array_equal(
        elements(tmp_path / 'out', 'train')[0], elements(tmp_path / 'both', 'train')[0]
    )
    assert elements(tmp_path / 'out', 'validation')[1] == [0]
    before = content(tmp_path / 'out')
    save(classes / 'test' / 'fish' / '1.png', picture(1))
    run(classes / 'test', tmp_path / 'out', '--size=8', code=2)
    assert "has the class 'fish', which is not among the 2 classes" in last_error(capfd)
    (classes / 'test' / 'fish').rename(classes / 'test' / 'cat')
    run(classes / 'test', tmp_path / 'out', '--size=16', code=2)
    assert "with image {'size': 8" in last_error(capfd)
    run(classes / 'test', tmp_path / 'out', '--size=8', '--name=zoo', code=2)
    assert "with dataset 'pets', but this command has 'zoo'" in last_error(capfd)
    save(classes / 'train' / 'cat' / 'new.png', picture(1))
    run(classes / 'train', tmp_path / 'out', '--size=8', code=2)
    assert "already has the split 'train' with other images" in last_error(capfd)
    assert content(tmp_path / 'out') == before


@pytest.mark.parametrize('make, more, says', [
    (lambda path: None, [], 'does not exist'),
    (lambda path: path.mkdir(), [], 'has no files; pass one of these'),
    (lambda path: save(path / 'a' / '1.png', picture(0)), [], 'such as --split=train'),
    (lambda path: save(path / 'train' / 'a' / '1.png', picture(0)), ['--split=test'],
     "has the split(s) train, but not 'test'"),
    (lambda path: path.write_bytes(b'\x1f\x8b12345678'), [], 'is compressed (gzip)'),
    (lambda path: path.write_bytes(b'hello' * 300), ['--split=train'], 'is damaged or not a tar'),
    (lambda path: (save(path / 'train' / 'a' / '1.png', picture(0)),
                   save(path / 'val' / '1.png', picture(0))), [],
     'the split validation of {path} has no class folders'),
    (lambda path: (save(path / 'train' / 'a' / '1.png', picture(0)),
                   save(path / 'training' / 'a' / '1.png', picture(0))), [],
     'has train and training, two names for one split'),
    (lambda path: save(path / 'train_8x8' / '1.png', picture(0)), ['--size=4'], '--size is 4, but'),
    (lambda path: (write_batches(path), (path / 'train_data_batch_4').unlink()), [],
     'lacks train_data_batch_4'),
    (lambda path: (write_batches(path), os.truncate(path / 'train_data_batch_4', 300)), [],
     'train_data_batch_4 is damaged'),
    (lambda path: write_batches(path), ['--size=4'], 'download the files of size 4'),
    (lambda path: write_batches(path), ['--size=8x4'], '--size is 8x4, but'),
    (lambda path: save(path / 'train_8x8' / '1.png', picture(0)), ['--size=4x8'],
     'has images already resized to 8'),
    (lambda path: (path.mkdir(), (path / 'a.jpg').write_text('x')), ['--split=train'],
     'the split train has no usable image'),
])
def test_refuses(tmp_path, make, more, says, capfd):
    source = tmp_path / 'source.tar' if 'tar' in says or 'gzip' in says else tmp_path / 'source'
    make(source)
    run(source, tmp_path / 'out', *more, code=2)
    assert says.format(path=source) in last_error(capfd)
    assert not (tmp_path / 'out' / 'manifest.json').exists()


def test_truncated_tar(classes, tmp_path, capfd):
    path = pack(classes, tmp_path / 'pets.tar')
    os.truncate(path, path.stat().st_size // 2)
    run(path, tmp_path / 'out', code=2)
    assert 'pets.tar is damaged or not a tar' in last_error(capfd)


def test_does_not_write_among_other_files(classes, tmp_path, capfd):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').write_text('42')
    run(classes, tmp_path / 'out', code=2)
    assert 'has other files' in last_error(capfd)


def test_does_not_write_into_the_source_or_a_file(classes, tmp_path, capfd):
    run(classes, classes / 'out', code=2)
    assert f'{classes / "out"} is inside {classes}' in last_error(capfd)
    (tmp_path / 'file').touch()
    run(classes, tmp_path / 'file', code=2)
    assert 'is a file, not a folder; pass a folder' in last_error(capfd)


@pytest.mark.parametrize('size', ['0', '48x', '0x3', 'x', '48x32x3', '-1'])
def test_no_size(size, capsys):
    assert prepare.main(['prepare', 'x', '--out=y', f'--size={size}']) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        f'argument --size: {size!r} is not a whole number above 0, nor HEIGHTxWIDTH such as 48x32\n'
    )


def test_help(capsys):
    assert prepare.main(['prepare', '--help']) == 0
    said = capsys.readouterr().out
    assert '64, or HEIGHTxWIDTH such as 48x32' in said
    for source in ('CLASS/IMAGE', '.parquet', 'dataset.json', 'KEY.cls', 'CIFAR-10', '_part2_npz.zip',
                   'ILSVRC2012_img_val.tar', 'ILSVRC/Data/CLS-LOC', 'IDX', 'train_64x64', '__MACOSX'):
        assert source in said


def test_empty_class_tar(tmp_path):
    empty = io.BytesIO()
    tarfile.open(fileobj=empty, mode='w').close()
    save(tmp_path / 'a' / '1.png', picture(0))
    with tarfile.open(tmp_path / 'train.tar', 'w') as tar:
        tar.add(tmp_path / 'a', 'a')
        info = tarfile.TarInfo('b.tar')
        info.size = len(empty.getvalue())
        tar.addfile(info, io.BytesIO(empty.getvalue()))
    run(tmp_path / 'train.tar', tmp_path / 'out', '--size=8')
    assert manifest(tmp_path / 'out')['classes'] == ['a', 'b']
    assert elements(tmp_path / 'out', 'train')[1] == [0]


def test_grey_folders_stay_grey_and_colour_joins_them(tmp_path, capfd):
    source, out = tmp_path / 'source', tmp_path / 'out'
    for split in ('train', 'test'):
        for name in 'ab':
            (source / split / name).mkdir(parents=True)
            Image.new('L', (9, 9), 7).save(source / split / name / '1.png')
    run(source, out, '--size=8')
    assert manifest(out)['image']['channels'] == 1 and manifest(out)['kind'] == 'photographs'
    assert elements(out, 'train')[0][0].shape == (8, 8, 1)
    Image.new('RGB', (9, 9), (1, 2, 3)).save(source / 'test' / 'a' / '2.png')
    run(source, tmp_path / 'mixed', '--size=8')
    assert manifest(tmp_path / 'mixed')['image']['channels'] == 3
    # Alone, its training images would be grey; but the set is in colour already.
    run(source, tmp_path / 'later', '--size=8', '--split=test')
    run(source, tmp_path / 'later', '--size=8', '--split=train')
    assert elements(tmp_path / 'later', 'train')[0][0].shape == (8, 8, 3)


def test_rotation_and_transparency_are_counted(tmp_path, capfd):
    source = tmp_path / 'train'
    source.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 3
    for k in range(3):
        Image.new('RGBA', (9, 9), (200, 0, 0, 0)).save(source / f'{k}.png', exif=exif if k else None)
    run(source, tmp_path / 'out', '--size=8')
    said = capfd.readouterr().err
    assert 'train: 2 of 3 images: each has an EXIF rotation that was not applied' in said
    assert 'train: 3 of 3 images: each has transparent pixels' in said
    assert said.count('EXIF') == 1  # not a line for each
    run(source, tmp_path / 'white', '--size=8', '--rotate', '--background=white')
    assert 'EXIF' not in (said := capfd.readouterr().err) and 'transparent' not in said
    assert (elements(tmp_path / 'white', 'train')[0][0] == 255).all()
    image = manifest(tmp_path / 'white')['image']
    assert image['rotated'] == 'as EXIF says' and image['background'] == [255, 255, 255]


def test_colours_and_flags_without_a_meaning(tmp_path, capfd):
    assert prepare.main(['prepare', str(tmp_path), '--out=x', '--background=whitish']) == 2
    assert "'whitish' is not a colour; use white" in capfd.readouterr().err
    pixels = np.zeros((4, 8, 8), np.uint8)
    for name, array in (('images-idx3', pixels), ('labels-idx1', np.zeros(4, np.uint8))):
        write_idx(tmp_path / f'train-{name}-ubyte', array)
    assert prepare.main(['prepare', str(tmp_path), f'--out={tmp_path}/../o', '--rotate']) == 2
    assert '--rotate is for image files, but' in last_error(capfd)
