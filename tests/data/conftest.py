"""Sets of images to prepare."""

import contextlib
from concurrent import futures

import pytest
from prepared_pictures import SIZE, picture, save

from tarflow_jax.data import shards, splits


@pytest.fixture
def classes(tmp_path):
    """Folders of two classes in two splits; image k of all is picture(k)."""
    folder = tmp_path / 'pets'
    for k in range(6):
        save(folder / 'train' / ('cat' if k < 4 else 'dog') / f'{k}.png', picture(k))
    for k in range(6, 9):
        save(folder / 'val' / ('cat' if k < 7 else 'dog') / f'{k}.png', picture(k))
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(splits, 'SHARD_PIXEL_BYTES', 2 * SIZE * SIZE * 3)


@pytest.fixture
def in_threads(monkeypatch):
    """Encodes in threads, which start at once."""

    @contextlib.contextmanager
    def threads(workers):
        with futures.ThreadPoolExecutor(workers) as pool:
            yield pool

    monkeypatch.setattr(shards, 'worker_processes', threads)
