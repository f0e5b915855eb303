"""Reference statistics in the formats of others and in ours, there and back."""

import json
import pickle
import zipfile

import numpy as np
import pytest

from tarflow_jax.evaluation import statistics_files
from tarflow_jax.evaluation.frechet import Statistics, frechet_distance
from tarflow_jax.torch_file import read_torch_file
from tarflow_jax.torch_writer import write_torch_file

RNG = np.random.default_rng(0)
FEATURES = RNG.standard_normal((50, 5)) + 3
MEAN, COVARIANCE = FEATURES.mean(0), np.cov(FEATURES, rowvar=False)
SPATIAL = Statistics(50, np.arange(3.0), np.diag([1.0, 2.0, 3.0]))
STATISTICS = Statistics(50, MEAN, COVARIANCE, {'split': 'test', 'flip': False}, SPATIAL)


def same(found, wanted=STATISTICS, rtol=0.0):
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=rtol)
    np.testing.assert_allclose(found.covariance, wanted.covariance, rtol=rtol, atol=rtol)
    assert found.mean.dtype == found.covariance.dtype == np.float64


def test_ours_reads_back(tmp_path):
    statistics_files.write(tmp_path / 'ours.npz', STATISTICS)
    found = statistics_files.read(tmp_path / 'ours.npz')
    same(found)
    same(found.spatial, SPATIAL)
    assert found.count == found.spatial.count == 50
    assert found.about == {'split': 'test', 'flip': False, 'format': 'tarflow_jax'}
    assert [path.name for path in tmp_path.iterdir()] == ['ours.npz']


def test_others_read_ours(tmp_path):
    statistics_files.write(tmp_path / 'ours.npz', STATISTICS)
    with np.load(tmp_path / 'ours.npz') as archive:  # allow_pickle is off
        arrays = dict(archive)
    assert sorted(arrays) == ['manifest', 'mu', 'mu_s', 'sigma', 'sigma_s']
    np.testing.assert_array_equal(arrays['mu'], MEAN)
    np.testing.assert_array_equal(arrays['sigma_s'], SPATIAL.covariance)
    assert json.loads(str(arrays['manifest'])) == {
        'format': 'tarflow_jax', 'count': 50, 'about': {'split': 'test', 'flip': False},
    }


def test_adm_and_edm(tmp_path):
    numbers = dict(mu=MEAN.astype(np.float32), sigma=COVARIANCE)
    np.savez_compressed(tmp_path / 'edm.npz', **numbers)
    found = statistics_files.read(tmp_path / 'edm.npz')
    same(found, rtol=1e-7)
    assert (found.count, found.spatial, found.about) == (None, None, {'format': 'edm'})
    # Images, if there are any, are not read: these could not be.
    np.savez(
        tmp_path / 'adm.npz', **numbers, mu_s=SPATIAL.mean, sigma_s=SPATIAL.covariance,
        arr_0=np.array([object()]),
    )
    found = statistics_files.read(tmp_path / 'adm.npz')
    assert found.about == {'format': 'adm'}
    same(found.spatial, SPATIAL)
    # What was read is written again, and then is ours.
    statistics_files.write(tmp_path / 'ours.npz', found)
    again = statistics_files.read(tmp_path / 'ours.npz')
    assert (again.count, again.about) == (None, {'format': 'tarflow_jax'})


def test_torchmetrics_reads_back(tmp_path):
    statistics_files.write(tmp_path / 'ours.pth', STATISTICS)
    found = statistics_files.read(tmp_path / 'ours.pth')
    same(found, rtol=1e-12)
    assert (found.count, found.spatial) == (50, None)
    assert found.about == {'format': 'torchmetrics'}
    assert frechet_distance(found, STATISTICS) < 1e-12
    state = read_torch_file(tmp_path / 'ours.pth')
    np.testing.assert_allclose(state['real_features_sum'], FEATURES.sum(0), rtol=1e-13)
    np.testing.assert_allclose(state['real_features_cov_sum'], FEATURES.T @ FEATURES, rtol=1e-12)
    assert state['real_features_num_samples'] == 50
    assert state['real_features_num_samples'].dtype == state['fake_features_num_samples'].dtype
    assert [state[f'fake_features_{n}'].shape for n in ('sum', 'cov_sum', 'num_samples')] == [
        (5,), (5, 5), (),
    ]
    assert not any(state[name].any() for name in state if name.startswith('fake'))


def torch_state(**changed):
    state = {
        'inception.weight': np.zeros((2, 2), np.float32),  # the network's own, left alone
        'real_features_sum': FEATURES.sum(0),
        'real_features_cov_sum': FEATURES.T @ FEATURES,
        'real_features_num_samples': np.int64(50),
    }
    return {name: value for name, value in (state | changed).items() if value is not None}


def test_state_with_weights_of_the_network(tmp_path):
    write_torch_file(tmp_path / 'state.pth', torch_state())
    same(statistics_files.read(tmp_path / 'state.pth'), rtol=1e-12)


@pytest.mark.parametrize('changed, message', [
    ({'real_features_sum': None}, r'lacks real_features_sum \(it has inception'),
    ({'real_features_num_samples': np.int64(1)}, 'must be the number of images, at least 2'),
    ({'real_features_num_samples': np.float32(9)}, 'num_samples = 9.0, but it must be'),
    ({'real_features_sum': np.zeros(4)}, r'sum \[4\] and real_features_cov_sum \[5, 5\]'),
    ({'real_features_sum': np.full(5, np.nan)}, 'the mean has numbers that are not finite'),
    ({'real_features_sum': np.zeros(5, bool)}, 'real_features_sum is bool'),
])
def test_states_refused(tmp_path, changed, message):
    write_torch_file(tmp_path / 'state.pth', torch_state(**changed))
    refused(tmp_path / 'state.pth', message)


def refused(path, message):
    with pytest.raises(ValueError, match=message) as raised:
        statistics_files.read(path)
    assert str(path) in str(raised.value) and str(raised.value).endswith('.')
    assert '\n' not in str(raised.value)


MANIFEST = json.dumps({'format': 'tarflow_jax', 'count': 50, 'about': {}})


@pytest.mark.parametrize('changed, message', [
    ({'sigma': None}, r'lacks sigma \(it has mu\)'),
    ({'mu_s': np.zeros(3)}, 'lacks sigma_s'),
    ({'sigma': np.eye(4)}, r'mean has shape \[5\] and the covariance \[4, 4\]'),
    ({'mu': MEAN[None]}, r'mean has shape \[1, 5\]'),
    ({'sigma': COVARIANCE * np.inf}, 'the covariance has numbers that are not finite'),
    ({'mu': MEAN.astype(complex)}, 'mu is complex128, but must be real numbers'),
    ({'mu': np.array(list('abcde'))}, 'mu is <U1'),
    ({'mu': np.array([object()] * 5)}, 'has Python objects, which are not loaded'),
    ({'manifest': np.array('{')}, 'has a manifest that was not written here'),
    ({'manifest': np.array('[' * 9999)}, 'has a manifest that was not written here'),
    ({'manifest': np.array(MANIFEST.replace('50', '"50"'))}, 'has a manifest that was not'),
    ({'manifest': np.zeros(3)}, 'has a manifest that was not written here'),
    ({'manifest': np.array(MANIFEST.replace('50', '-5'))}, '-5 images are too few for a covariance; compute'),
    ({'manifest': np.array(MANIFEST.replace('50', '1e400'))}, 'has a manifest that was not'),
    ({'sigma': np.diag([1.0, 2, -3, 4, 5])}, 'has the negative variance -3'),
    ({'sigma': np.triu(np.ones((5, 5)))}, 'the covariance is not symmetric'),
])
def test_archives_refused(tmp_path, changed, message):
    arrays = {'mu': MEAN, 'sigma': COVARIANCE} | changed
    arrays = {name: value for name, value in arrays.items() if value is not None}
    np.savez(tmp_path / 'file.npz', **arrays)
    refused(tmp_path / 'file.npz', message)


def test_other_files_refused(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(pickle.dumps({'fid': {'mu': MEAN}}))
    refused(path, 'is a pickle, as written by the suite of EDM2')
    path.write_bytes(b'hello')
    refused(path, "starts with b'he', so it is neither a .npz nor a .pth")
    path.write_bytes(b'')
    refused(path, "starts with b'', so it is neither")
    with pytest.raises(FileNotFoundError, match='nothing.npz is not a file; pass statistics as'):
        statistics_files.read(tmp_path / 'nothing.npz')


@pytest.mark.parametrize('name', ['whole.npz', 'whole.pth'])
def test_damaged_archives_refused(tmp_path, name):
    statistics_files.write(tmp_path / name, STATISTICS)
    whole = (tmp_path / name).read_bytes()
    damaged = tmp_path / 'damaged'
    damaged.write_bytes(whole[: len(whole) // 2])
    refused(damaged, 'damaged')
    place = whole.index(MEAN.tobytes() if name == 'whole.npz' else (50 * MEAN).tobytes())
    damaged.write_bytes(whole[:place] + b'xxxx' + whole[place + 4 :])
    refused(damaged, 'damaged')


@pytest.mark.parametrize('name', ['whole.npz', 'whole.pth'])
def test_flipped_bytes_are_noticed(tmp_path, name):
    statistics_files.write(tmp_path / name, STATISTICS)
    whole, rng, noticed = (tmp_path / name).read_bytes(), np.random.default_rng(0), 0
    wanted, damaged = statistics_files.read(tmp_path / name), tmp_path / f'damaged-{name}'
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        damaged.write_bytes(flipped)
        try:
            found = statistics_files.read(damaged)
        except ValueError:
            noticed += 1
            continue
        same(found, wanted)
        assert (found.count, found.about) == (50, wanted.about)
        assert (found.spatial is None) == (wanted.spatial is None)
    assert noticed > 30  # the rest are dates and padding


def test_an_archive_that_unpacks_to_gigabytes(tmp_path):
    with zipfile.ZipFile(tmp_path / 'file.npz', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr('mu.npy', bytes(2**26 + 1))
        file.writestr('sigma.npy', b'')
    refused(tmp_path / 'file.npz', 'mu.npy: is a decompression bomb')


def test_failed_writes_leave_the_file(tmp_path):
    path = tmp_path / 'kept.npz'
    statistics_files.write(path, STATISTICS)
    with pytest.raises(TypeError):
        statistics_files.write(path, Statistics(2, MEAN, COVARIANCE, {'x': object()}))
    same(statistics_files.read(path))
    with pytest.raises(ValueError, match="kept.txt ends with '.txt'; choose a name in .npz or"):
        statistics_files.write(tmp_path / 'kept.txt', STATISTICS)
    with pytest.raises(FileNotFoundError, match='no_folder does not exist'):
        statistics_files.write(tmp_path / 'no_folder' / 'x.npz', STATISTICS)
    with pytest.raises(ValueError, match='x.pth needs the number of images'):
        statistics_files.write(tmp_path / 'x.pth', Statistics(None, MEAN, COVARIANCE))
    assert [found.name for found in tmp_path.iterdir()] == ['kept.npz']
