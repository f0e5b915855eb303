"""Progress: the clock's arithmetic, and the lines that a log shows."""

import contextlib

import pytest

from tarflow_jax.training import progress
from tarflow_jax.training.progress import Clock, Lines, in_words, timed


@pytest.fixture
def passing(monkeypatch):
    """Lets time pass, perhaps within a context of the clock; there is no other time."""
    now = [100.0]
    monkeypatch.setattr(progress.time, 'perf_counter', lambda: now[0])

    def passes(seconds, within=None):
        with within or contextlib.nullcontext():
            now[0] += seconds

    return passes


def test_the_clock_counts_what_did_not_go_into_steps(passing):
    clock = Clock(batch_size=8, flops_per_image=3.0)
    passing(20.0, clock.paused())  # restoring, compiling
    passing(10.0, clock.waiting())
    passing(10.0)
    assert clock.speed(1) == {'goodput': 0.25}
    passing(5.0, clock.waiting())
    passing(15.0)
    passing(40.0, clock.paused())  # pictures
    assert clock.speed(6) == {
        'images_per_second': 2.0, 'model_flops_per_second': 6.0, 'data_wait': 0.25,
        'goodput': 0.25,  # 25 of 100 seconds
    }


def test_speed_and_time_left_from_the_step_that_compiled(passing):
    clock = Clock(batch_size=8, flops_per_image=3.0)
    passing(60.0, clock.paused())
    clock.steady(5)
    assert clock.left(5, 105) is None and clock.speed(5) == {'goodput': 0.0}
    passing(10.0)
    assert clock.speed(25)['images_per_second'] == 16.0
    assert clock.left(25, 105) == 40.0
    passing(20.0, clock.paused())  # there will be more such pauses
    assert clock.left(25, 105) == 120.0


def test_a_line_at_most_every_ten_seconds(passing, caplog):
    caplog.set_level('INFO')
    tell = Lines(total_steps=1_000_000)
    tell(1, {'loss': -0.123456789}, None)
    passing(9.0)
    assert tell(2, {'loss': 0.5}, 1.0) == 'loss 0.5, 1 s left'  # for the bar of a terminal
    passing(1.0)
    tell(3, {'loss': 2.0, 'images_per_second': 11234.5}, 7384.0)
    tell(1_000_000, {'loss': float('nan'), 'images_per_second': 0.98765}, 0.0)  # the last
    assert caplog.messages == [
        'step 1/1000000: loss -0.12346',
        'step 3/1000000: loss 2, 11,234 images/s, 2 h 3 min left',
        'step 1000000/1000000: loss nan, 0.99 images/s',
    ]


@pytest.mark.parametrize('seconds, words', [
    (0.2, '0 s'), (59.6, '1 min 0 s'), (45, '45 s'), (3599, '59 min 59 s'), (12000, '3 h 20 min'),
    (90000.0, '1 d 1 h'), (10**6, '11 d 13 h'),
])
def test_in_words(seconds, words):
    assert in_words(seconds) == words


def test_timed(passing, caplog):
    caplog.set_level('INFO')
    with timed('compiling'):
        assert caplog.messages == ['compiling ...']
        passing(2.25)
    assert caplog.messages[1:] == ['compiling took 2.2 s']
