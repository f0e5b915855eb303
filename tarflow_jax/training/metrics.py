"""Where metrics and pictures go: the log, `metrics.jsonl` and TensorBoard event files."""

import json
import logging
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from tarflow_jax.flow.model import TarFlow

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes scalars and images under the method names of clu's MetricWriter.

    clu's own needs TensorFlow. A resumed run drops what an earlier process wrote beyond its
    checkpoint, so that the files read as if nothing had happened.

    Args:
      workdir: holds `metrics.jsonl` and the event files.
      resume_step: last step whose entries are kept.
    """

    def __init__(self, workdir, *, resume_step: int = 0):
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / 'metrics.jsonl'
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step(line) <= resume_step]
        temporary = path.with_suffix('.tmp')
        temporary.write_text(''.join(line + '\n' for line in kept))
        temporary.replace(path)
        self._jsonl = path.open('a')
        self._events = SummaryWriter(
            str(workdir / 'tensorboard'), purge_step=resume_step + 1, flush_secs=30
        )

    def write_scalars(self, step: int, scalars: dict) -> None:
        scalars = {name: float(value) for name, value in scalars.items()}
        self._jsonl.write(json.dumps({'step': step, **scalars}) + '\n')
        self._jsonl.flush()
        for name, value in scalars.items():
            self._events.add_scalar(name, value, step)
        shown = ('loss', 'prior', 'logdet', 'gradient_norm', 'images_per_second')
        shown = [n for n in shown if n in scalars] or list(scalars)
        log.info('step %d: %s', step, ', '.join(f'{n} {scalars[n]:.5g}' for n in shown))

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Pictures uint8 [H, W, C] by name."""
        for name, image in images.items():
            self._events.add_image(name, image, step, dataformats='HWC')

    def flush(self) -> None:
        self._events.flush()

    def close(self) -> None:
        self._jsonl.close()
        self._events.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _step(line: str) -> float:
    """Step of a line of metrics.jsonl; infinite for the half line that a killed run leaves."""
    try:
        return json.loads(line)['step']
    except (ValueError, KeyError, TypeError):
        return float('inf')


def model_flops(model: TarFlow) -> float:
    """Floating-point operations that one image costs in a train step, forward and backward.

    Two per multiply-add; the backward pass counts twice the forward one; causal attention counts
    the half that the mask leaves; recomputation is not counted.
    """
    T, D, C = model.num_patches, model.patch_dim, model.width
    outputs = D if model.volume_preserving else 2 * D
    layer = 2 * T * 12 * C * C + 2 * T * T * C
    ends = 2 * T * (D + outputs) * C
    return 3.0 * sum(depth * layer + ends for depth in model.layers_per_block)
