"""Features and statistics of a source, with a network that numpy can follow."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command_line import with_devices

from tarflow_jax.data.sources import InMemory
from tarflow_jax.evaluation import statistics_files
from tarflow_jax.evaluation.features import (
    cached_statistics,
    features_of,
    statistics_and_features,
    statistics_of,
)
from tarflow_jax.training import sharding

ROOT = Path(__file__).parents[2]
PIXELS = np.random.default_rng(0).integers(0, 256, (22, 4, 6, 1), np.uint8)


class Network:
    """Pooled: the mean of every column of the picture times weights. Spatial: the first row."""

    def __init__(self, spatial=True, about='fake'):
        self.variables = {'weights': np.linspace(1, 2, 6, dtype=np.float32)}
        self.about = {'name': about}
        self.spatial = spatial
        self.traced = 0

    def features(self, variables, images):
        self.traced += 1
        x = images[..., 0].astype(jnp.float32)
        pooled = x.mean(1) * variables['weights']
        return {'pooled': pooled} | ({'spatial': x[:, 0]} if self.spatial else {})

    def by_hand(self, pixels):
        return pixels[..., 0].astype(np.float64).mean(1) * self.variables['weights']


@dataclass(frozen=True)
class Source(InMemory):
    about: dict = field(default_factory=lambda: {'dataset': 'squares/16', 'split': 'train'})
    reads: list = field(default_factory=list)

    def __getitem__(self, i):
        self.reads.append(i)
        return super().__getitem__(i)


def source(pixels=PIXELS, **options):
    return Source(pixels, np.zeros(len(pixels), np.int32), **options)


def options(batch_size=8, devices=None):
    devices = jax.devices() if devices is None else jax.devices()[:devices]
    return dict(mesh=sharding.make_mesh(devices=devices), batch_size=batch_size)


def pooled(found):
    return np.concatenate([batch['pooled'] for batch in found])


def test_features_in_order_without_padding():
    network = Network()
    found = list(features_of(network, source(), **options()))
    assert [len(batch['pooled']) for batch in found] == [8, 8, 6]
    assert all(type(value) is np.ndarray for batch in found for value in batch.values())
    np.testing.assert_allclose(pooled(found), network.by_hand(PIXELS), rtol=1e-6)
    spatial = np.concatenate([batch['spatial'] for batch in found])
    np.testing.assert_array_equal(spatial, PIXELS[:, 0, :, 0])
    list(features_of(network, source(), **options()))
    assert network.traced == 1


def test_flips_depend_on_seed_and_place_alone():
    network = Network(spatial=False)
    found = pooled(features_of(network, source(), flip=True, seed=3, **options()))
    plain, mirrored = network.by_hand(PIXELS), network.by_hand(PIXELS[:, :, ::-1])
    is_plain = np.isclose(found, plain, rtol=1e-5).all(1)
    is_mirrored = np.isclose(found, mirrored, rtol=1e-5).all(1)
    assert (is_plain ^ is_mirrored).all() and 5 < is_mirrored.sum() < 17
    again = pooled(features_of(network, source(), flip=True, seed=3, **options(3, devices=1)))
    np.testing.assert_allclose(again, found, rtol=1e-6)
    part = pooled(features_of(network, source(PIXELS[:9]), flip=True, seed=3, **options()))
    np.testing.assert_allclose(part, found[:9], rtol=1e-6)
    other = pooled(features_of(network, source(), flip=True, seed=4, **options()))
    assert abs(other - found).max() > 1


def test_statistics():
    network = Network()
    found = statistics_of(network, source(), about={'a': 1}, **options())
    wanted = network.by_hand(PIXELS)
    assert (found.count, found.spatial.count, found.about) == (22, 22, {'a': 1})
    np.testing.assert_allclose(found.mean, wanted.mean(0), rtol=1e-6)
    np.testing.assert_allclose(
        found.covariance, np.cov(wanted, rowvar=False), rtol=1e-4, atol=1e-3
    )
    rows = PIXELS[:, 0, :, 0].astype(np.float64)
    np.testing.assert_allclose(found.spatial.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.spatial.covariance, np.cov(rows, rowvar=False), rtol=1e-10)
    without = statistics_of(Network(spatial=False), source(), about={}, **options())
    assert without.spatial is None


def test_kept_features_are_a_random_subset():
    network = Network(spatial=False)
    whole = network.by_hand(PIXELS)

    def places(keep, seed, **changed):
        statistics, kept = statistics_and_features(
            network, source(), keep=keep, seed=seed, about={}, **options(**changed)
        )
        assert statistics.count == 22 and kept.dtype == np.float32
        return [int(abs(whole - row).sum(1).argmin()) for row in kept]

    first = places(7, 0)
    assert len(set(first)) == 7 and first == sorted(first) and max(first) > 10
    assert places(7, 0, batch_size=3, devices=1) == first
    assert places(7, 1) != first
    assert places(100, 0) == list(range(22))
    assert places(0, 0) == []


def test_too_few_images():
    with pytest.raises(ValueError, match=r'^1 image\(s\) are too few'):
        statistics_of(Network(), source(PIXELS[:1]), about={}, **options())


def test_cache(tmp_path):
    folder, first = tmp_path / 'statistics', source()
    computed = cached_statistics(folder, Network(), first, **options())
    assert len(first.reads) >= 22
    (file,) = folder.iterdir()
    name, digest = file.stem.rsplit('-', 1)
    assert name == 'squares-16-train' and len(digest) == 8 and file.suffix == '.npz'
    again = source()
    kept = cached_statistics(folder, Network(), again, **options(batch_size=16))
    assert again.reads == []
    np.testing.assert_array_equal(kept.covariance, computed.covariance)
    np.testing.assert_array_equal(kept.spatial.mean, computed.spatial.mean)
    assert kept.about == computed.about == {
        'source': {'dataset': 'squares/16', 'split': 'train'}, 'images': 22,
        'network': {'name': 'fake'}, 'flip': False, 'flip_seed': None, 'format': 'tarflow_jax',
    }
    # Without flips the seed does not matter. All else makes other files.
    cached_statistics(folder, Network(), again, seed=5, **options())
    assert again.reads == []
    for network, changed, flips in (
        (Network(about='other'), source(), {}),
        (Network(), source(about={'dataset': 'squares/16', 'split': 'test'}), {}),
        (Network(), source(PIXELS[:20]), {}),
        (Network(), source(), dict(flip=True)),
        (Network(), source(), dict(flip=True, seed=1)),
    ):
        cached_statistics(folder, network, changed, **flips, **options())
        assert changed.reads
    names = sorted(path.stem.rsplit('-', 1)[0] for path in folder.iterdir())
    assert names == ['squares-16-test'] + ['squares-16-train'] * 3 + [
        'squares-16-train-flipped'
    ] * 2


def test_what_is_wrong_in_the_cache_is_computed_again(tmp_path, caplog):
    wanted = cached_statistics(tmp_path, Network(), source(), **options())
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    other = {**wanted.about, 'images': 23}
    statistics_files.write(file, type(wanted)(23, np.zeros(6), np.eye(6), other))
    found = cached_statistics(tmp_path, Network(), source(), **options())
    np.testing.assert_array_equal(found.mean, wanted.mean)
    file.write_bytes(whole[:-200])
    found = cached_statistics(tmp_path, Network(), source(), **options())
    np.testing.assert_array_equal(found.mean, wanted.mean)
    assert 'is damaged' in caplog.text
    np.testing.assert_array_equal(statistics_files.read(file).mean, wanted.mean)


def test_source_that_does_not_say_what_it_is(tmp_path):
    plain = InMemory(PIXELS, np.zeros(22, np.int32))
    found = cached_statistics(tmp_path, Network(), plain, **options())
    assert found.count == 22 and not list(tmp_path.iterdir())


WORKER = """
import json
import sys

import numpy as np

from tarflow_jax.training import processes

processes.start()
import jax
from features_test import Network, cached_statistics, features_of, options, pooled, source

folder = f'{sys.argv[1]}/{jax.process_index()}'  # disks of their own
network = Network()
rows = pooled(features_of(network, source(), flip=True, **options(batch_size=6)))
for _ in range(2):
    seen = source()
    found = cached_statistics(folder, network, seen, flip=True, **options(batch_size=6))
    parts = found.mean, found.covariance, found.spatial.mean, found.spatial.covariance
    numbers = [part.tolist() for part in parts]
    said = [len(seen.reads), found.count, numbers, rows.tolist(), found.about]
    print('said', json.dumps(said))
"""


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    search = (ROOT, ROOT / 'tests', ROOT / 'tests' / 'evaluation', os.environ.get('PYTHONPATH', ''))
    started = [
        subprocess.Popen(
            [sys.executable, '-c', WORKER, str(tmp_path)], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
            env=os.environ | dict(
                PYTHONPATH=os.pathsep.join(map(str, search)), JAX_PLATFORMS='cpu',
                XLA_FLAGS=with_devices(1),
                JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES='2', JAX_PROCESS_ID=str(i),
            ),
        )
        for i in range(2)
    ]
    said = []
    for process in started:
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        said.append([json.loads(line[4:]) for line in output.splitlines() if line[:4] == 'said'])
    (computed, kept), others = said
    assert computed[0] > 0 and kept[0] == 0 and others[1][0] == 0
    assert computed[1:] == kept[1:] == others[0][1:] == others[1][1:]
    assert (tmp_path / '0').is_dir() and not (tmp_path / '1').exists()
    alone = features_of(Network(), source(), flip=True, **options())
    np.testing.assert_allclose(computed[3], pooled(alone), rtol=1e-6)
