"""Files given in the place of another are named, with where they belong."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from tarflow_jax import wrong_files
from tarflow_jax.convert import load_official
from tarflow_jax.evaluation import sample_files
from tarflow_jax.flow.flow import TarFlow
from tarflow_jax.torch_file import read_torch_file

MODEL = TarFlow(
    image_size=8, image_channels=1, patch_size=4, width=8, head_dim=8, layers_per_block=(1,)
)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode='w') as archive:
        archive.addfile(tarfile.TarInfo('a.png'))
    return file.getvalue()


PIXELS = np.zeros((2, 12), np.uint8)
CASES = {
    'site': (npz(data=PIXELS, labels=[1, 2]), "a batch of the ImageNet site's", 'data.prepare'),
    'samples': (npz(arr_0=PIXELS), 'samples', 'evaluate.frechet.samples'),
    'statistics': (npz(mu=np.zeros(3), sigma=np.eye(3)), 'statistics', 'frechet.references'),
    'cifar': (pickle.dumps({'batch_label': 'a', 'data': PIXELS}, 2), '(CIFAR', 'data.prepare'),
    'pickle': (pickle.dumps({'a': 1}, 2), 'is a pickle', 'torch.save(model.state_dict(), path)'),
    'parquet': (b'PAR1' + bytes(20), 'a parquet file', 'data.prepare'),
    'png': (b'\x89PNG\r\n' + bytes(20), 'is an image', 'data.prepare'),
    'tar': (tar(), 'a tar archive', 'data.prepare'),
    'pointer': (b'version https://git-lfs.github.com/spec/v1\n', 'Git LFS', 'git lfs pull'),
    'page': (b'<!DOCTYPE html><html>', 'a web page', 'download the file again'),
}


@pytest.mark.parametrize('name', CASES)
def test_files_in_the_place_of_a_checkpoint(tmp_path, name):
    content, *words = CASES[name]
    for suffix in ('.pth', '.safetensors', '.npz', ''):
        path = tmp_path / f'file{suffix}'
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_official(path, MODEL)
        for word in (str(path), *words):
            assert word in str(error.value)
    with pytest.raises(ValueError, match='pass a .pth file that torch.save wrote'):
        read_torch_file(path)


def test_files_in_the_place_of_samples(tmp_path):
    for name in ('site', 'statistics', 'parquet'):
        content, *words = CASES[name]
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words[0]):
            sample_files.open_samples(path)


def test_folders(tmp_path):
    assert wrong_files.described(tmp_path) is None
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    for folder in ('run', 'run/checkpoints'):
        with pytest.raises(ValueError, match=f'the folder of a run; pass --workdir={tmp_path}/run;'):
            load_official(tmp_path / folder, MODEL)
    (tmp_path / 'manifest.json').write_text('{}')
    assert f'data.path={tmp_path}' in wrong_files.described(tmp_path)


def test_files_that_tell_nothing(tmp_path):
    for content in (b'', b'PK\x03\x04', b'\xff' * 100, b'not a checkpoint'):
        (tmp_path / 'file').write_bytes(content)
        assert wrong_files.described(tmp_path / 'file') is None
