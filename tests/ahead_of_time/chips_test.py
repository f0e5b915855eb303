"""The chips' figures, the time of collectives on their torus, and the out-of-memory message."""

import itertools

import pytest

from tarflow_jax.ahead_of_time.chips import (
    CHIPS,
    HOP_SECONDS,
    MEASURED,
    Slice,
    measured_range,
    out_of_memory,
)

V5E, V5P = CHIPS['v5e'], CHIPS['v5p']
GIB = 2**30


def _rows(shape, axis):
    """Groups of partitions along one axis of a box whose last axis is fastest."""
    number = {place: i for i, place in enumerate(itertools.product(*map(range, shape)))}
    groups = {}
    for place, i in number.items():
        groups.setdefault(place[:axis] + place[axis + 1 :], []).append(i)
    return tuple(map(tuple, groups.values()))


def test_published_all_reduce_bandwidth_of_a_pod():
    # cloud.google.com: 51.2 TB/s for 256 chips of v5e, 102.4 TB/s for 256 of v6e
    assert 256 * V5E.ici_bandwidth == 51.2e12
    assert 256 * CHIPS['v6e'].ici_bandwidth == 102.4e12


def test_published_figures_of_the_newest_chip():
    # 2307 TFLOP/s, 192 GiB, 7380 GB/s, 1200 GB/s both ways and 100 Gbit/s a chip of two devices
    chip = CHIPS['tpu7x']
    assert chip.devices * chip.bf16_flops == 2307e12 and chip.devices * chip.hbm_bytes == 192 * GIB
    assert chip.devices * chip.hbm_bandwidth == 7380e9
    assert chip.devices * 2 * chip.ici_bandwidth == 1200e9
    assert chip.devices * 8 * chip.dcn_bandwidth == 100e9


def test_published_datacenter_network_of_a_pod():
    assert 256 * 8 * V5E.dcn_bandwidth == 6.4e12 and 8 * V5P.dcn_bandwidth == 50e9


@pytest.mark.parametrize('kind, sent', [
    ('all-reduce', 2 * 3 / 4), ('reduce-scatter', 3 / 4), ('all-gather', 3), ('one-to-one', 1),
])
def test_exchange_between_slices(kind, sent):
    seconds = Slice(V5E, (4, 4), slices=4).dcn_seconds(kind, 1e9)
    assert seconds == pytest.approx(sent * 1e9 / 3.125e9)


def test_a_chip_without_measured_runs_has_the_range_of_all():
    assert measured_range('v5e') == (MEASURED['v5e'], ('v5e',))
    (low, high), chips = measured_range('v4')
    assert chips == tuple(MEASURED) and 'v4' not in chips
    assert low == min(low for low, _ in MEASURED.values())
    assert high == max(high for _, high in MEASURED.values())


def test_all_reduce_uses_the_axes_that_the_group_spans():
    slice_, size = Slice(V5E, (16, 16)), 1e9
    one = slice_.collective_seconds('all-reduce', size, _rows((16, 16), 1))
    all_ = slice_.collective_seconds('all-reduce', size, (tuple(range(256)),))
    assert one == pytest.approx(2 * 15 / 16 * size / 100e9 + 30 * HOP_SECONDS)
    assert all_ == pytest.approx(2 * 255 / 256 * size / 200e9 + 60 * HOP_SECONDS)


@pytest.mark.parametrize('chip, shape, rings', [(V5E, (4, 4), 0.5), (V5P, (4, 4, 4), 1.0)])
def test_short_axes_wrap_only_where_the_chip_has_links(chip, shape, rings):
    seconds = Slice(chip, shape).collective_seconds('all-gather', 1e9, _rows(shape, 0))
    bandwidth = chip.ici_bandwidth / chip.torus_axes * rings
    assert seconds == pytest.approx(3 / 4 * 1e9 / bandwidth + 3 * HOP_SECONDS)


def test_coordinates_tell_where_partitions_sit():
    # a 2 x 8 slice whose partitions are numbered column by column
    places = tuple((i % 2, i // 2) for i in range(16))
    pairs = tuple((2 * i, 2 * i + 1) for i in range(8))
    seconds = Slice(V5E, (2, 8), places).collective_seconds('all-gather', 1e9, pairs)
    assert seconds == pytest.approx(1 / 2 * 1e9 / 50e9 + HOP_SECONDS)


def test_permutation_and_all_to_all():
    slice_ = Slice(V5E, (16, 16))
    pairs = tuple((i, (i + 1) % 256) for i in range(256))
    assert slice_.collective_seconds('collective-permute', 1e9, pairs) == pytest.approx(
        1e9 / 50e9 + HOP_SECONDS
    )
    # half of every chip's bytes cross the middle of a ring of 16: 16 x 0.5 / 2 links x 2 ways
    assert slice_.collective_seconds('all-to-all', 1e9, _rows((16, 16), 1)) == pytest.approx(
        4 * 1e9 / 100e9 + 15 * HOP_SECONDS
    )


def test_alone_costs_nothing():
    assert Slice(V5E, (1, 1)).collective_seconds('all-reduce', 1e9, ((0,),)) == 0


@pytest.mark.parametrize(
    'message',
    [
        'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO '
        'temporaries (40.00G) exceeds available HBM (15.75G). HLO module: jit__lambda.',
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
        'hbm. Used 40.00G of 15.75G hbm. Exceeded hbm capacity by 24.25G.',
    ],
)
def test_out_of_memory(message):
    assert out_of_memory(message) == (40 * GIB, 15.75 * GIB)


def test_other_errors_are_not_out_of_memory():
    assert out_of_memory('INVALID_ARGUMENT: used 3 of 4 arguments') is None
