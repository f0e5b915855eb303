"""Hours of training, over restarts and without the gaps between processes."""

import numpy as np
import pytest

from tarflow_jax.evaluation.report import timeline


def lines(times, steps, firsts=(0,)):
    """Lines of metrics; those in `firsts` are the first of a process and have no speed."""
    return [
        {'step': step, 'loss': 1.0, 'wall_time': time}
        | ({} if i in firsts else {'images_per_second': 9.0})
        for i, (time, step) in enumerate(zip(times, steps))
    ]


def test_one_process():
    # 36 seconds for 10 steps; the first ten count at the same pace.
    steps, hours = timeline.hours(lines(1e9 + np.array([0, 36, 72, 144]), [10, 20, 30, 50]))
    assert steps.tolist() == [10, 20, 30, 50]
    np.testing.assert_allclose(hours, [0.01, 0.02, 0.03, 0.05], rtol=1e-4)


def test_the_gap_of_a_restart_is_left_out():
    # The second process begins a day later, from a checkpoint at step 20.
    times = 1e9 + np.array([0, 36, 86400, 86436])
    steps, hours = timeline.hours(lines(times, [10, 20, 30, 40], firsts=(0, 2)))
    np.testing.assert_allclose(hours, [0.01, 0.02, 0.03, 0.04], rtol=1e-4)
    # A clock that was set back counts as a gap, too.
    _, hours = timeline.hours(lines(1e9 + np.array([0, 36, -500, -464]), [10, 20, 30, 40]))
    np.testing.assert_allclose(hours, [0.01, 0.02, 0.03, 0.04], rtol=1e-4)


def test_pictures_and_pauses_inside_a_process_count():
    _, hours = timeline.hours(lines(1e9 + np.array([0, 36, 72, 1872, 1908]), [10, 20, 30, 40, 50]))
    np.testing.assert_allclose(np.diff(hours), [0.01, 0.01, 0.5, 0.01], rtol=1e-4)


@pytest.mark.parametrize('metrics', [
    [], [{'step': 1, 'loss': 1.0}] * 2, lines([1e9], [1]), lines([1e9, 2e9], [1, 2], firsts=(0, 1)),
    lines([1e9, 1e9 + 1], [2, 2]), [{'step': 1, 'wall_time': 1e9}, {'step': 2, 'wall_time': 2e9}],
    lines([float('nan'), float('nan')], [1, 2]),
])
def test_runs_without_times(metrics):
    assert [x.size for x in timeline.hours(metrics)] == [0, 0]
