"""Hours of training, over restarts and without the gaps between processes."""

import numpy as np
import pytest

from tarflow_jax.evaluation.report import timeline


def process(begin, steps, *, pace=3.6, startup=30.0, pauses=(), speed_at_first=True):
    """The lines of a process that begins at a time, after the step steps.start.

    Args:
      steps: the range of its lines, `steps.start` left out.
      pace: seconds a step; startup, pauses {step: seconds}: time that does not go into steps.
    """
    now, lost, lines = begin + startup, startup, []
    for step in steps[1:]:
        now += pace * steps.step
        line = {'step': step, 'loss': 1.0, 'wall_time': now, 'data_wait': 0.0}
        if lines or speed_at_first:
            line['images_per_second'] = 64 / pace
        lines.append(line | {'goodput': 1 - lost / (now - begin)})
        pause = dict(pauses).get(step, 0.0)
        now, lost = now + pause, lost + pause
    return lines


def test_one_process():
    # 36 seconds for 10 steps; the first ten count at the same pace.
    steps, hours = timeline.hours(process(1e9, range(0, 60, 10)))
    assert steps.tolist() == [10, 20, 30, 40, 50]
    np.testing.assert_allclose(hours, [0.01, 0.02, 0.03, 0.04, 0.05], rtol=1e-4)


@pytest.mark.parametrize('speed_at_first', [True, False])
@pytest.mark.parametrize('gap', [120, 86400])
def test_the_gaps_of_restarts_are_left_out(gap, speed_at_first):
    lines, begin = process(1e9, range(0, 310, 10)), 1e9
    for start in (300, 600):
        begin = lines[-1]['wall_time'] + gap
        lines += process(begin, range(start, start + 310, 10), speed_at_first=speed_at_first)
    steps, hours = timeline.hours(lines)
    np.testing.assert_allclose(hours, steps / 1000, rtol=1e-4)


def test_pictures_and_pauses_inside_a_process_count():
    # Half an hour of pictures and validation after step 30.
    _, hours = timeline.hours(process(1e9, range(0, 210, 10), pauses={30: 1800}))
    np.testing.assert_allclose(hours[3] - hours[2], 0.51, rtol=1e-4)
    np.testing.assert_allclose(hours[-1], 0.7, rtol=1e-4)


def test_a_clock_that_was_set_back():
    lines = process(1e9, range(0, 60, 10))
    for line in lines[2:]:
        line['wall_time'] -= 5000
    _, hours = timeline.hours(lines)
    np.testing.assert_allclose(hours, [0.01, 0.02, 0.03, 0.04, 0.05], rtol=1e-4)


def test_lines_without_goodput():
    lines = process(1e9, range(0, 30, 10)) + process(2e9, range(20, 50, 10), speed_at_first=False)
    lines = [{k: v for k, v in line.items() if k != 'goodput'} for line in lines]
    np.testing.assert_allclose(timeline.hours(lines)[1], [0.01, 0.02, 0.03, 0.04], rtol=1e-4)


LINE = {'step': 1, 'loss': 1.0, 'images_per_second': 9.0}


@pytest.mark.parametrize('metrics', [
    [], [LINE] * 2, [LINE | {'wall_time': 1e9}],
    [{'step': s, 'loss': 1.0, 'wall_time': 1e9 + s} for s in (1, 2)],
    [LINE | {'wall_time': 1e9 + s} for s in (1, 2)],
    [{'step': s, 'wall_time': 1e9 * s} for s in (1, 2)],
    [LINE | {'step': s, 'wall_time': float('nan')} for s in (1, 2)],
])
def test_runs_without_times(metrics):
    assert [x.size for x in timeline.hours(metrics)] == [0, 0]
