"""Computes the cost of a run: `python benchmarks/run_cost.py FILE.json --images=N --epochs=E [--price=P]`.

FILE is the output of `--mode=compile --json=FILE`: predicted seconds per step, chips and batch of
each slice. With P, the price of one chip for one hour in any currency, the last column is the price
of the run. The prediction is close to the roofline of the chip. The column "measured" has the
chip-hours if the prediction is as accurate as for the published steps in
benchmarks/published_steps.py. `--slowdown=1.5` means that steps take 1.5 times as long; measure it
in a run: predicted images per second divided by `images_per_second` in its metrics.jsonl. Sampling,
evaluation, and hours in which a slice is idle cost extra.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple


class Cost(NamedTuple):
    """The cost of a run: optimizer steps, hours of wall time, and chips times hours."""

    steps: int
    hours: float
    chip_hours: float


def cost(step_seconds: float, chips: int, batch_size: int, images: int, epochs: float) -> Cost:
    """Computes steps = epochs * floor(images / batch), hours = steps * seconds / 3600, chip-hours."""
    steps = round(epochs * (images // batch_size))
    hours = steps * step_seconds / 3600
    return Cost(steps, hours, chips * hours)


def lines(rows: list[dict], images: int, epochs: float, price: float | None, slowdown: float):
    """Yields a line of headings and one line per slice of the compile table."""
    names = ('slice', 'chips', 'batch', 'step s', 'steps', 'hours', 'chip-hours', 'measured', 'price')
    yield '  '.join(f'{name:>11}' for name in names)
    for row in rows:
        seconds = row['predicted_step_seconds']
        if seconds is None:
            yield f'{row["topology"]:>11}  does not fit'
            continue
        low, high = row.get('measured_over_predicted') or (None, None)
        seconds *= slowdown
        run = cost(seconds, row['chips'], row['batch_size'], images, epochs)
        cells = (
            row['topology'], row['chips'], row['batch_size'], f'{seconds:.3f}', run.steps,
            f'{run.hours:.1f}', f'{run.chip_hours:.0f}',
            '-' if low is None or slowdown != 1 else
            f'{low * run.chip_hours:.0f}-{high * run.chip_hours:.0f}',
            '-' if price is None else f'{price * run.chip_hours:.2f}',
        )
        yield '  '.join(f'{cell:>11}' for cell in cells)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('file', type=Path)
    parser.add_argument('--images', type=int, required=True, help='size of the training set')
    parser.add_argument('--epochs', type=float, required=True)
    parser.add_argument('--price', type=float, help='price of one chip for one hour')
    parser.add_argument('--slowdown', type=float, default=1.0, help='measured over predicted time')
    given = parser.parse_args()
    rows = json.loads(given.file.read_text())
    print(*lines(rows, given.images, given.epochs, given.price, given.slowdown), sep='\n')


if __name__ == '__main__':
    main()
