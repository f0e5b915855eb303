"""ImageNet's validation images get their classes, and a part of a set without splits stays put."""

import functools
import io
import tarfile
import zipfile

import numpy as np
import pytest
import scipy.io
from prepared_pictures import (
    elements,
    encoded,
    last_error,
    manifest,
    pack,
    picture,
    run,
    save,
)

pytestmark = pytest.mark.usefixtures('in_threads')

# The kit numbers classes in another order than their names are sorted in.
WNIDS = [f'n{(7 * k) % 1000 + 1:08d}' for k in range(1000)]
TRUTH = [5, 1000, 5, 1]


def wanted():
    return [sorted(WNIDS).index(WNIDS[number - 1]) for number in TRUTH]


@functools.cache
def meta():
    kinds = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('num_children', 'O'), ('children', 'O')]
    rows = [(k, wnid, f'thing {k}', 0, np.zeros(0)) for k, wnid in enumerate(WNIDS, 1)]
    rows += [(k, f'm{k:08d}', 'group', 2, np.array([1, 2])) for k in range(1001, 1861)]
    saved = io.BytesIO()
    scipy.io.savemat(saved, {'synsets': np.array(rows, kinds)[:, None]}, do_compression=True)
    return saved.getvalue()


def write_kit(folder):
    (folder / 'data').mkdir(parents=True)
    (folder / 'data' / 'meta.mat').write_bytes(meta())
    path = folder / 'data' / 'ILSVRC2012_validation_ground_truth.txt'
    path.write_text('\n'.join(map(str, TRUTH)) + '\n')
    return path


def write_validation(folder):
    for k in range(len(TRUTH)):
        save(folder / f'ILSVRC2012_val_{k + 1:08d}.png', picture(k))
    return folder


def write_csv(path):
    rows = [f'ILSVRC2012_val_{k + 1:08d},{WNIDS[number - 1]} 1 2 3 4 ' for k, number in enumerate(TRUTH)]
    path.write_text('ImageId,PredictionString\n' + '\n'.join(reversed(rows)) + '\n')


def check(out, classes=1000):
    images, labels = elements(out, 'validation')
    np.testing.assert_array_equal(images, [picture(k) for k in range(len(TRUTH))])
    names = manifest(out)['classes']
    assert names == sorted(names) and len(names) == classes
    assert [names[label] for label in labels] == [WNIDS[number - 1] for number in TRUTH]


@pytest.mark.parametrize('kit', ['unpacked', 'packed', 'given'])
def test_the_flat_tar_with_the_development_kit(tmp_path, kit):
    folder = tmp_path / 'imagenet'
    folder.mkdir()
    write_validation(tmp_path / 'val')
    source = pack(tmp_path / 'val', folder / 'ILSVRC2012_img_val.tar')
    options = ['--size=8', '--name=imagenet']
    if kit == 'given':
        options += [f'--labels={write_kit(tmp_path / "elsewhere")}']
    else:
        write_kit(folder / 'ILSVRC2012_devkit_t12')
    if kit == 'packed':
        with tarfile.open(folder / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz') as tar:
            tar.add(folder / 'ILSVRC2012_devkit_t12', 'ILSVRC2012_devkit_t12')
        (folder / 'ILSVRC2012_devkit_t12').rename(tmp_path / 'away')
    run(source, tmp_path / 'out', *options)
    check(tmp_path / 'out')
    assert elements(tmp_path / 'out', 'validation')[1] == wanted()


@pytest.mark.parametrize('as_zip', [False, True])
def test_kaggle(tmp_path, as_zip):
    root = tmp_path / 'imagenet-object-localization-challenge'
    images = root / 'ILSVRC' / 'Data' / 'CLS-LOC'
    for number in set(TRUTH):
        save(images / 'train' / WNIDS[number - 1] / '1.png', picture(number))
    write_validation(images / 'val')
    save(images / 'test' / 'ILSVRC2012_test_00000001.png', picture(0))
    (root / 'ILSVRC' / 'Annotations').mkdir()
    (root / 'ILSVRC' / 'Annotations' / 'a.xml').write_text('x')
    write_csv(root / 'LOC_val_solution.csv')
    source, options = root, ['--size=8']
    if as_zip:
        source = tmp_path / f'{root.name}.zip'
        with zipfile.ZipFile(source, 'w') as archive:
            for path in sorted((root / 'ILSVRC').rglob('*')):
                archive.write(path, path.relative_to(root))
        options += [f'--labels={root / "LOC_val_solution.csv"}']
    run(source, tmp_path / 'out', *options)
    check(tmp_path / 'out', classes=3)
    assert elements(tmp_path / 'out', 'train')[1] == [0, 1, 2]
    made = manifest(tmp_path / 'out')
    assert list(made['splits']) == ['train', 'validation'] and made['dataset'] == root.name
    (name, note), = made['splits']['train']['notes']['list']
    assert name == 'test' and 'was left out' in note
    run(images / 'val', tmp_path / 'val', '--size=8', '--name=x', *options[1:])
    check(tmp_path / 'val', classes=3)
    mapping = '\n'.join(f'{wnid} thing, other' for wnid in WNIDS)
    (root / 'LOC_synset_mapping.txt').write_text(mapping)
    run(images / 'val', tmp_path / 'all', '--size=8', '--name=x', *options[1:])
    check(tmp_path / 'all')


def test_without_labels(tmp_path, capfd):
    source = write_validation(tmp_path / 'val')
    run(source, tmp_path / 'out', '--size=8', '--name=x')
    assert manifest(tmp_path / 'out')['classes'] is None
    save(tmp_path / 'pets' / 'train' / 'cat' / '1.png', picture(0))
    source.rename(tmp_path / 'pets' / 'val')
    run(tmp_path / 'pets', tmp_path / 'both', '--size=8', code=2)
    assert 'give a file of labels with --labels' in last_error(capfd)


@pytest.mark.parametrize('name, text, says', [
    ('LOC_val_solution.csv', 'ImageId,PredictionString\nILSVRC2012_val_00000001,n01 1\n', 'has no label for ILSVRC2012_val_00000002'),
    ('LOC_val_solution.csv', 'ImageId,PredictionString\nILSVRC2012_val_00000001\n', 'line 2 is not IMAGE,CLASS'),
    ('LOC_val_solution.csv', '\xff', 'is damaged or not a file of ImageNet'),
    ('ILSVRC2012_validation_ground_truth.txt', '1\n2\n1001\n', "'1001' is not a number from 1 to 1000"),
    ('ILSVRC2012_validation_ground_truth.txt', '', 'is not a number from 1 to 1000'),
    ('labels.json', '{}', 'is not a known file of labels; pass LOC_val_solution.csv'),
    (None, '', 'does not exist; correct --labels'),
])
def test_labels_that_are_refused(tmp_path, name, text, says, capfd):
    source = write_validation(tmp_path / 'val')
    write_kit(tmp_path)
    path = tmp_path / 'data' / (name or 'nothing.csv')
    if name:
        path.write_bytes(text.encode('latin1'))
    run(source, tmp_path / 'out', '--size=8', f'--labels={path}', code=2)
    assert says in last_error(capfd)


def test_the_kit_must_be_whole(tmp_path, capfd):
    source = write_validation(tmp_path / 'val')
    truth = write_kit(tmp_path)
    (tmp_path / 'data' / 'meta.mat').write_bytes(b'x' * 500)
    run(source, tmp_path / 'out', '--size=8', f'--labels={truth}', code=2)
    assert 'it is not a .mat file of version 5' in last_error(capfd)
    (tmp_path / 'data' / 'meta.mat').unlink()
    run(source, tmp_path / 'out', '--size=8', f'--labels={truth}', code=2)
    assert 'unpack the whole development kit' in last_error(capfd)


def test_labels_of_a_source_that_has_its_own(classes, tmp_path, capfd):
    write_csv(tmp_path / 'f.csv')
    run(classes, tmp_path / 'out', f'--labels={tmp_path / "f.csv"}', code=2)
    assert 'are in class folders; leave out --labels' in last_error(capfd)


def names_of(out, split, folder):
    """The files that the images of a split were."""
    known = {path.read_bytes(): path.name for path in folder.rglob('*.png')}
    return {known[encoded(image)] for image in elements(out, split)[0]}


def test_test_fraction_is_stable(tmp_path, capfd):
    folder = tmp_path / 'pets'
    for k in range(100):
        (folder / f'{k}.png').parent.mkdir(exist_ok=True)
        (folder / f'{k}.png').write_bytes(encoded(picture(k)))
    run(folder, tmp_path / 'a', '--size=8', '--test_fraction=0.2')
    first = names_of(tmp_path / 'a', 'test', folder)
    assert 10 < len(first) < 30 and list(manifest(tmp_path / 'a')['splits']) == ['test', 'train']
    for k in range(100, 200):
        (folder / f'{k}.png').write_bytes(encoded(picture(k)))
    run(folder, tmp_path / 'b', '--size=8', '--test_fraction=0.2')
    second = names_of(tmp_path / 'b', 'test', folder)
    assert {name for name in second if int(name[:-4]) < 100} == first
    run(folder, tmp_path / 'c', '--size=8', '--test_fraction=0.3', '--split=test')
    assert second < names_of(tmp_path / 'c', 'test', folder)
    assert list(manifest(tmp_path / 'c')['splits']) == ['test']


@pytest.mark.parametrize('fraction, says', [
    ('1.5', 'choose one between 0 and 1'), ('0', 'choose one between 0 and 1'),
    ('nan', 'choose one between 0 and 1'), ('1e-9', 'leaves all images of'),
    ('0.999999999', 'leaves no images of'),
])
def test_test_fractions_that_are_refused(tmp_path, fraction, says, capfd):
    for k in range(4):
        save(tmp_path / 'pets' / f'{k}.png', picture(k))
    run(tmp_path / 'pets', tmp_path / 'out', '--size=8', f'--test_fraction={fraction}', code=2)
    assert says in last_error(capfd)


def test_test_fraction_of_a_source_with_splits(classes, tmp_path, capfd):
    run(classes, tmp_path / 'out', '--size=8', '--test_fraction=0.5', code=2)
    assert 'has the split(s) train, validation; leave out --test_fraction' in last_error(capfd)


def test_a_folder_around_splits_may_hold_other_files(classes, tmp_path):
    (classes / 'README').write_text('hello')
    run(pack(classes, tmp_path / 'all.tar', 'pets'), tmp_path / 'out', '--size=8')
    assert list(manifest(tmp_path / 'out')['splits']) == ['train', 'validation']
    notes = manifest(tmp_path / 'out')['splits']['train']['notes']['list']
    assert notes == [['pets/README', 'is outside the splits and was left out']]


def test_a_kit_that_unpacks_to_too_much(tmp_path, monkeypatch, capfd):
    from tarflow_jax.data import imagenet_labels

    monkeypatch.setattr(imagenet_labels, '_MAX_BYTES', 2**20)
    source = write_validation(tmp_path / 'val')
    path = tmp_path / 'ILSVRC2012_devkit_t12.tar.gz'
    with tarfile.open(path, 'w:gz') as tar:
        info = tarfile.TarInfo('ILSVRC2012_devkit_t12/data/zeros')
        info.size = 2**24
        tar.addfile(info, io.BytesIO(bytes(2**24)))
    run(source, tmp_path / 'out', '--size=8', code=2)
    assert f'{path} is damaged or not a file of ImageNet: it unpacks to more' in last_error(capfd)
