"""Hours of training, from the times at which a run wrote its metrics."""

import math

import numpy as np

SAME = 0.02  # by which the goodput may differ from what it would be in the same process


def hours(metrics: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Returns how long a run had trained at its steps: (steps [N], hours [N]), N at least 2 or 0.

    Time is summed over restarts, without the gaps between processes. The steps up to the first line
    of a process count at the median pace of the run, because nothing says when the process before
    it stopped.

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
    seconds, taken = np.diff([line['wall_time'] for line in lines]), np.diff(steps)
    # A clock that was set back tells no time either.
    known = ~_restarts(lines, seconds, taken) & (seconds >= 0)
    if not known.any():
        return np.zeros(0), np.zeros(0)
    pace = np.median(seconds[known] / taken[known])
    seconds = np.where(known, seconds, pace * taken)
    # The time before the first line is unknown, too: it counts at the same pace.
    return steps, (pace * steps[0] + np.concatenate([[0.0], np.cumsum(seconds)])) / 3600


def _restarts(lines: list[dict], seconds: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """Tells which lines after the first are the first of a process: bool [N - 1].

    The goodput is the share of time that went into steps since the process began. A line belongs to
    the process of the line before it if its goodput follows from that one's, the steps between and
    the time between. Pauses of a process lower the goodput; a gap between two does not.
    """
    rates = np.array([line.get('images_per_second', math.nan) for line in lines], float)
    waits = np.array([line.get('data_wait', 0.0) for line in lines], float)
    goodputs = np.array([line.get('goodput', math.nan) for line in lines], float)
    # The first line of a process may have no speed.
    found = ~np.isfinite(rates[1:])
    images = (seconds * rates[1:] / taken)[~found & (seconds > 0)]
    if not images.size or not np.isfinite(goodputs).all():
        return found
    # Intervals without a pause give the batch size.
    batch = np.quantile(images, 0.1)
    steady = np.where(np.isfinite(rates) & (rates > 0), rates, np.nanmedian(rates))
    worked = np.concatenate([[lines[0]['step']], taken]) * batch / steady * (1 - waits)
    productive = worked[0]
    for i in range(1, len(lines)):
        lasted = productive / max(goodputs[i - 1], 1e-6) + seconds[i - 1]
        expected = (productive + worked[i]) / max(lasted, 1e-6)
        if not found[i - 1] and abs(goodputs[i] - expected) <= SAME:
            productive += worked[i]
        else:
            found[i - 1], productive = True, worked[i]
    return found
