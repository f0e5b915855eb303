"""The pipeline: batch k is a pure function of the source, the seed and k."""

import time
from itertools import islice

import jax.numpy as jnp
import numpy as np
import pytest

from tarflow_jax.data import pipeline, sources

COUNT = 37


@pytest.fixture(scope='module')
def source():
    """37 different 4x4x3 images, none of them symmetric; the label is the index."""
    image = np.random.default_rng(0).integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
    return sources.InMemory(image, np.arange(COUNT, dtype=np.int32))


def take(batches, count):
    try:
        return list(islice(batches, count))
    finally:
        batches.close()


def assert_equal_batches(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def joined(shares):
    return [
        {name: np.concatenate([share[name] for share in step]) for name in step[0]}
        for step in zip(*shares)
    ]


def is_flipped(source, batch):
    straight = source.image_NxHxWxC[batch['label']]
    equal = (batch['image'] == straight).all(axis=(1, 2, 3))
    mirrored = (batch['image'] == straight[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (equal ^ mirrored).all()
    return mirrored


def test_shapes_and_types(source):
    for size in (1, 8):
        (batch,) = take(pipeline.train_batches(source, batch_size=size, seed=0, flip=True), 1)
        assert batch.keys() == {'image', 'label'}
        assert batch['image'].shape == (size, 4, 4, 3) and batch['image'].dtype == np.uint8
        assert batch['label'].shape == (size,) and batch['label'].dtype == np.int32
        assert jnp.asarray(batch['image']).sum() == batch['image'].sum()


def test_images_keep_their_labels(source):
    for batch in take(pipeline.train_batches(source, batch_size=8, seed=0), 10):
        assert not is_flipped(source, batch).any()


def share(batch_size, index, count):
    """Rows of one of `count` equal shares of a batch."""
    return np.arange(batch_size).reshape(count, -1)[index]


@pytest.mark.parametrize('start', [0, 5])
@pytest.mark.parametrize('process_count', [1, 2, 4])
def test_global_batches_do_not_depend_on_processes_or_start(source, process_count, start):
    whole = take(pipeline.train_batches(source, batch_size=8, seed=3, flip=True), 12)
    shares = [
        take(
            pipeline.train_batches(
                source, batch_size=8, seed=3, flip=True, start=start,
                rows=share(8, p, process_count),
            ),
            12 - start,
        )
        for p in range(process_count)
    ]
    assert shares[0][0]['image'].shape[0] == 8 // process_count
    assert_equal_batches(joined(shares), whole[start:])


def test_rows_need_not_be_neighbours(source):
    rows = np.array([0, 3, 4, 7])
    whole = take(pipeline.train_batches(source, batch_size=8, seed=3, flip=True), 6)
    some = take(pipeline.train_batches(source, batch_size=8, seed=3, flip=True, rows=rows), 6)
    assert_equal_batches(some, [{k: v[rows] for k, v in batch.items()} for batch in whole])


def test_a_late_start_reads_nothing_before_it(source):
    class Counting:
        reads = 0

        def __len__(self):
            return len(source)

        def __getitem__(self, i):
            Counting.reads += 1
            return source[i]

    began = time.monotonic()
    late = take(pipeline.train_batches(Counting(), batch_size=8, seed=3, start=1_000_000), 2)
    assert time.monotonic() - began < 5
    assert Counting.reads <= 8 * (2 + pipeline.READ_OPTIONS.prefetch_buffer_size)
    last = take(pipeline.train_batches(source, batch_size=8, seed=3, start=1_000_001), 1)
    assert_equal_batches(late[1:], last)


def test_each_epoch_is_a_new_permutation_and_batches_cross_its_border(source):
    batches = take(pipeline.train_batches(source, batch_size=10, seed=1), 15)
    label = np.concatenate([batch['label'] for batch in batches])
    epochs = label[: 4 * COUNT].reshape(4, COUNT)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(COUNT), (4, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = take(pipeline.train_batches(source, batch_size=10, seed=2), 15)
    assert (np.concatenate([batch['label'] for batch in other]) != label).mean() > 0.9


def test_flips_are_half_repeatable_and_new_in_each_epoch(source):
    def flips():
        batches = take(pipeline.train_batches(source, batch_size=COUNT, seed=0, flip=True), 40)
        by_label = np.zeros((40, COUNT), bool)
        for epoch, batch in enumerate(batches):
            by_label[epoch, batch['label']] = is_flipped(source, batch)
        return by_label

    first = flips()
    np.testing.assert_array_equal(first, flips())
    # 1480 fair coins: five standard deviations are 0.065.
    assert abs(first.mean() - 0.5) < 0.065
    assert abs((first[1:] != first[:-1]).mean() - 0.5) < 0.065


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_deliver_the_same_batches(source, workers):
    options = dict(batch_size=8, seed=3, flip=True, rows=np.array([1, 2, 6]), start=4)
    wanted = take(pipeline.train_batches(source, **options), 9)
    got = take(pipeline.train_batches(source, workers=workers, **options), 9)
    assert_equal_batches(got, wanted)
    assert type(got[0]['image']) is np.ndarray


class WithFeatures(sources.InMemory):
    """The label and its square, as features."""

    def __getitem__(self, i):
        element = super().__getitem__(i)
        label = np.float32(element['label'])
        return element | {'features': np.array([label, label**2], np.float32)}


@pytest.mark.parametrize('workers', [0, 1])
def test_features_stay_with_their_image(source, workers):
    featured = WithFeatures(source.image_NxHxWxC, source.label_N)
    options = dict(batch_size=8, seed=3, flip=True, rows=np.array([1, 2, 6]), start=3)
    got = take(pipeline.train_batches(featured, workers=workers, **options), 8)
    for batch in got:
        assert batch['features'].shape == (3, 2) and batch['features'].dtype == np.float32
        np.testing.assert_array_equal(
            batch['features'], np.stack([batch['label'], batch['label'] ** 2], -1)
        )
    without = [{k: v for k, v in batch.items() if k != 'features'} for batch in got]
    assert_equal_batches(without, take(pipeline.train_batches(source, **options), 8))


def test_evaluation_passes_features_on(source):
    featured = WithFeatures(source.image_NxHxWxC, source.label_N)
    whole = take(pipeline.eval_batches(featured, batch_size=12), 100)
    features = np.concatenate([batch['features'] for batch in whole])
    assert features.dtype == np.float32
    labels = np.minimum(np.arange(48), COUNT - 1)  # padded with the last image and its features
    np.testing.assert_array_equal(features, np.stack([labels, labels**2], -1))


def test_close_is_quick_and_final(source):
    batches = pipeline.train_batches(source, batch_size=8, seed=0)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 1
    with pytest.raises(ValueError, match='closed'):
        next(batches)


@pytest.mark.parametrize('process_count', [1, 2, 4])
@pytest.mark.parametrize('batch_size', [4, 12, 36, 64])
def test_evaluation_sees_every_image_once_in_order(source, batch_size, process_count):
    steps = -(-COUNT // batch_size)
    shares = [
        take(
            pipeline.eval_batches(
                source, batch_size=batch_size, rows=share(batch_size, p, process_count)
            ),
            100,
        )
        for p in range(process_count)
    ]
    assert [len(share) for share in shares] == [steps] * process_count
    whole = joined(shares)
    assert all(batch['image'].shape == (batch_size, 4, 4, 3) for batch in whole)
    mask = np.concatenate([batch['mask'] for batch in whole])
    label = np.concatenate([batch['label'] for batch in whole])
    image = np.concatenate([batch['image'] for batch in whole])
    assert mask.dtype == np.float32 and image.dtype == np.uint8 and label.dtype == np.int32
    assert mask.sum() == COUNT
    np.testing.assert_array_equal(label[mask == 1], np.arange(COUNT))
    np.testing.assert_array_equal(image[mask == 1], source.image_NxHxWxC)
    assert (label[mask == 0] == COUNT - 1).all() and (mask[COUNT:] == 0).all()


def test_a_process_may_have_padding_alone(source):
    batches = pipeline.eval_batches(source, batch_size=36, rows=share(36, 3, 4))
    assert take(batches, 9)[-1]['mask'].tolist() == [0.0] * 9


def test_steps_per_epoch(source):
    assert pipeline.steps_per_epoch(source, 8) == 4
    assert pipeline.steps_per_epoch(source, COUNT) == 1
    for batch_size in (0, COUNT + 1):
        with pytest.raises(ValueError, match=f'^batch_size is {batch_size}, .*from 1 to 37'):
            pipeline.steps_per_epoch(source, batch_size)


def test_refusals(source):
    with pytest.raises(ValueError, match='the seed is -1'):
        pipeline.train_batches(source, batch_size=8, seed=-1)
    empty = sources.InMemory(source.image_NxHxWxC[:0], source.label_N[:0])
    with pytest.raises(ValueError, match='is empty'):
        pipeline.train_batches(empty, batch_size=8, seed=0)


def test_workers_need_shared_memory(source, monkeypatch, tmp_path):
    class Disk:
        free = 64 * 2**20

    monkeypatch.setattr(pipeline.sys, 'platform', 'linux')
    monkeypatch.setattr(pipeline, 'SHARED_MEMORY', str(tmp_path))
    monkeypatch.setattr(pipeline.shutil, 'disk_usage', lambda _: Disk)
    pipeline.check_workers(source, 100_000, 0)
    pipeline.check_workers(source, 100_000, 3)  # 4 batches of 100,000 images of 52 bytes each: 60 MiB
    with pytest.raises(ValueError) as error:
        pipeline.check_workers(source, 110_000, 3)
    assert str(error.value) == (
        f'workers 3 need 65 MiB in {tmp_path} to pass batches, which has 64 MiB free; enlarge it '
        '(docker run --shm-size=2g; in Kubernetes an emptyDir with medium: Memory mounted there), or '
        'set workers to 0, which reads with threads.'
    )
    monkeypatch.setattr(pipeline, 'SHARED_MEMORY', str(tmp_path / 'none'))
    with pytest.raises(ValueError, match='which has 0 MiB free'):
        pipeline.check_workers(source, 8, 1)
    monkeypatch.setattr(pipeline.sys, 'platform', 'darwin')
    pipeline.check_workers(source, 8, 1)
    with pytest.raises(ValueError, match='workers 1000 are too many for'):
        pipeline.check_workers(source, 8, 1000)
