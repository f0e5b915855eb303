"""The ImageNet site's .npz files, in their zips or unpacked, are the same images as its pickles."""

import io
import os
import zipfile

import numpy as np
import pytest
from prepared_pictures import content, elements, last_error, manifest, picture, run

pytestmark = pytest.mark.usefixtures('in_threads')

COUNT = 3


def npz(k, save=np.savez, **changed):
    data = np.stack([picture(10 * k + i).transpose(2, 0, 1).ravel() for i in range(COUNT)])
    saved = io.BytesIO()
    save(saved, **{'data': data, 'labels': np.array([1000, k + 1, 1]), 'mean': data.mean(0), **changed})
    return saved.getvalue()


def write_zips(folder, outer, save):
    folder.mkdir()
    names = [f'train_data_batch_{k}' for k in range(1, 11)] + ['val_data']
    places = [('train_part1', names[:5]), ('train_part2', names[5:10]), ('val', names[10:])]
    for part, inside in places:
        with zipfile.ZipFile(folder / f'Imagenet8_{part}_npz.zip', 'w', outer) as archive:
            for name in inside:
                folder_in_zip = f'Imagenet8_{part}_npz/' if part == 'val' else ''
                archive.writestr(f'{folder_in_zip}{name}.npz', npz(names.index(name), save))
    return folder


def check(out, splits=('train', 'validation')):
    if 'train' in splits:
        images, labels = elements(out, 'train')
        np.testing.assert_array_equal(images, [picture(10 * k + i) for k in range(10) for i in range(COUNT)])
        assert labels == [label for k in range(10) for label in (999, k, 0)]
    if 'validation' in splits:
        np.testing.assert_array_equal(elements(out, 'validation')[0], [picture(100 + i) for i in range(COUNT)])
    made = manifest(out)
    assert made['dataset'] == 'imagenet_resized/8x8 (box-resized, ImageNet site)'
    assert len(made['classes']) == 1000 and list(made['splits']) == list(splits)


@pytest.mark.parametrize('outer', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_zips(tmp_path, outer, save, small_shards):
    folder = write_zips(tmp_path / 'files', outer, save)
    run(folder, tmp_path / 'a')
    check(tmp_path / 'a')
    run(folder, tmp_path / 'b', '--workers=1')
    assert content(tmp_path / 'a') == content(tmp_path / 'b')


def test_one_zip_and_unpacked_files(tmp_path):
    folder = write_zips(tmp_path / 'files', zipfile.ZIP_DEFLATED, np.savez)
    run(folder / 'Imagenet8_val_npz.zip', tmp_path / 'val')
    check(tmp_path / 'val', ['validation'])
    run(folder / 'Imagenet8_train_part2_npz.zip', tmp_path / 'train')
    check(tmp_path / 'train', ['train'])
    for path in list(folder.iterdir()):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                (folder / os.path.basename(name)).write_bytes(archive.read(name))
        path.unlink()
    run(folder, tmp_path / 'all')
    check(tmp_path / 'all')
    (folder / 'train_data_batch_3.npz').unlink()
    run(folder, tmp_path / 'out', code=2)


@pytest.mark.parametrize('data, says', [
    (lambda: npz(0)[:300], 'is damaged or not a file of the ImageNet site'),
    (lambda: b'hello', 'is truncated or damaged'),
    (lambda: npz(0, labels=np.array([1, 2])), 'it has 3 images but 2 labels'),
    (lambda: npz(0, labels=np.array([1, 2, 1001])), 'has the label 1001'),
    (lambda: npz(0, labels=np.array([0.5, 1, 2])), 'its labels are float64 [3]'),
    (lambda: npz(0, data=np.zeros((3, 190), np.uint8)), 'rows of 190 numbers, which is not a square'),
    (lambda: npz(0, data=np.zeros((3, 192))), 'its data is float64 [3, 192]'),
    (lambda: npz(0, data=np.asfortranarray(np.ones((3, 192), np.uint8))), 'in Fortran order'),
    (lambda: npz(0, data=np.array([None] * 3)), 'it contains Python objects, which are not loaded'),
    (lambda: npz(0).replace(b'(3, 192), }', b'(3e9,19), }'), 'is damaged or not a file of'),
])
def test_hostile_files(tmp_path, data, says, capfd):
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'val_data.npz').write_bytes(data())
    run(tmp_path / 'files', tmp_path / 'out', code=2)
    said = last_error(capfd)
    assert f'{tmp_path / "files" / "val_data.npz"} ' in said and says in said


def test_rows_promised_and_not_there(tmp_path, capfd):
    data = npz(0, labels=np.ones(5, int)).replace(b'(3, 192), }', b'(5, 192), }')
    (tmp_path / 'files').mkdir()
    (tmp_path / 'files' / 'val_data.npz').write_bytes(data)
    run(tmp_path / 'files', tmp_path / 'out', code=2)
    assert 'val_data.npz is truncated; download it again' in last_error(capfd)


def test_zips_of_pickles_are_to_be_unpacked(tmp_path, capfd):
    with zipfile.ZipFile(tmp_path / 'Imagenet64_val.zip', 'w') as archive:
        archive.writestr('val_data', b'x')
    run(tmp_path / 'Imagenet64_val.zip', tmp_path / 'out', code=2)
    assert 'contains the pickle val_data; unpack the zip' in last_error(capfd)
