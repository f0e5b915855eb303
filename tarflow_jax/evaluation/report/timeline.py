"""Hours of training, from the times at which a run wrote its metrics."""

import math

import numpy as np


def hours(metrics: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Returns how long a run had trained at its steps: (steps [N], hours [N]), N at least 2 or 0.

    Time is summed over restarts, without the gaps between processes. The first line of a process
    has no speed, which marks a restart. The steps up to it count at the median pace of the run,
    because nothing says when the process before it stopped.

    Args:
      metrics: the lines of metrics.jsonl. `wall_time` is in Unix seconds; older runs have none.
    """
    lines = [
        line for line in metrics
        if 'loss' in line and math.isfinite(line.get('wall_time', math.nan))
    ]
    steps = np.array([line['step'] for line in lines], float)
    if len(lines) < 2 or (np.diff(steps) <= 0).any():
        return np.zeros(0), np.zeros(0)
    seconds = np.diff([line['wall_time'] for line in lines])
    taken = np.diff(steps)
    # A clock that was set back tells no time either.
    known = np.array(['images_per_second' in line for line in lines[1:]]) & (seconds >= 0)
    if not known.any():
        return np.zeros(0), np.zeros(0)
    pace = np.median(seconds[known] / taken[known])
    seconds = np.where(known, seconds, pace * taken)
    # The time before the first line is unknown, too: it counts at the same pace.
    return steps, (pace * steps[0] + np.concatenate([[0.0], np.cumsum(seconds)])) / 3600
