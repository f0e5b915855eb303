"""Where metrics and pictures go: the log, `metrics.jsonl` and TensorBoard event files."""

import json
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from tarflow_jax import files, json_files, paths
from tarflow_jax.flow.flow import Flow

FILE = 'metrics.jsonl'
BETWEEN_UPLOADS = 60  # seconds, but for checkpoints

log = logging.getLogger(__name__)
# It would say of every number of a run that diverges that it is not finite.
logging.getLogger('tensorboardX.x2num').setLevel(logging.ERROR)


class MetricWriter:
    """Writes scalars and images under the method names of clu's MetricWriter.

    clu's own needs TensorFlow. A resumed run drops what an earlier process wrote beyond its
    checkpoint, so that the files read as if nothing had happened. tensorboardX's SummaryWriter
    hands events to a thread of its own; should that fail to write, training would wait for it
    without end, so they are written here.

    Nothing can be appended to what is in a bucket. There the files are written to the disk, and
    `metrics.jsonl` is copied as a whole: with every checkpoint, and once a minute. The events since
    the last checkpoint become an event file of their own.

    Args:
      workdir: holds `metrics.jsonl` and the event files.
      resume_step: last step whose entries are kept.
    """

    def __init__(self, workdir, *, resume_step: int = 0):
        self._workdir = workdir = paths.of(workdir)
        kept = [entry for entry in read(workdir) if entry['step'] <= resume_step]
        self._disk, self._uploads = workdir, paths.in_bucket(workdir)
        if self._uploads:
            self._temporary = tempfile.TemporaryDirectory(prefix='tarflow_jax-')
            self._disk, self._uploaded = Path(self._temporary.name), time.monotonic()
        files.write_text(self._disk / FILE, ''.join(json.dumps(entry) + '\n' for entry in kept))
        self._jsonl = (self._disk / FILE).open('a')
        (self._disk / 'tensorboard').mkdir(exist_ok=True)
        self._first, self._event_files = resume_step, 0
        self._events = self._new_events()
        # TensorBoard drops what older files hold from this step on.
        self._write_event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        if self._uploads:
            self._upload_metrics()

    def _new_events(self) -> EventsWriter:
        # The name has the time in seconds; the suffix keeps a quick restart from the older file.
        suffix = f'.{self._first}' + (f'.{self._event_files:06d}' if self._uploads else '')
        self._event_files += 1
        return EventsWriter(str(self._disk / 'tensorboard' / 'events'), suffix)

    def _upload_metrics(self) -> None:
        paths.upload(self._disk / FILE, self._workdir / FILE)
        self._uploaded = time.monotonic()

    def _upload_events(self) -> None:
        for path in (self._disk / 'tensorboard').iterdir():
            if self._new:
                paths.upload(path, self._workdir / 'tensorboard' / path.name)
            path.unlink()
        self._new = False

    def _write_event(self, step: int, **content) -> None:
        self._new = True
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def write_scalars(self, step: int, scalars: dict) -> None:
        scalars = {name: float(value) for name, value in scalars.items()}
        self._jsonl.write(json.dumps({'step': step, **scalars}) + '\n')
        self._jsonl.flush()
        if self._uploads and time.monotonic() - self._uploaded > BETWEEN_UPLOADS:
            self._upload_metrics()
        for name, value in scalars.items():
            self._write_event(step, summary=summary.scalar(name, value))
        shown = ('loss', 'prior', 'logdet', 'gradient_norm', 'images_per_second', 'data_wait')
        shown = [n for n in shown if n in scalars] or list(scalars)
        log.info('step %d: %s', step, ', '.join(f'{n} {scalars[n]:.5g}' for n in shown))

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Pictures uint8 [H, W, C] by name."""
        for name, image in images.items():
            self._write_event(step, summary=summary.image(name, image, dataformats='HWC'))

    def flush(self) -> None:
        """Brings on disk what was written; call it before a checkpoint that comes after it."""
        self._events.flush()
        if self._uploads:
            self._upload_metrics()
            self._events.close()
            self._upload_events()
            self._events = self._new_events()

    def close(self) -> None:
        self._jsonl.close()
        self._events.close()
        if self._uploads:
            self._upload_metrics()
            self._upload_events()
            self._temporary.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class NoWriter:
    """Has MetricWriter's methods and writes nothing: for all processes but the first."""

    def write_scalars(self, step: int, scalars: dict) -> None:
        pass

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        pass

    def flush(self) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def read(workdir) -> list[dict]:
    """The lines of metrics.jsonl; none if it is missing, and not half a line of a killed run."""
    path = paths.of(workdir) / FILE
    found, damaged = [], 0
    lines = path.read_bytes().splitlines() if path.exists() and path.is_file() else []
    for line in lines:
        try:
            entry = json_files.parse(line, {str: float})
            json_files.check(entry, {'step': int})
            found.append(entry)
        except json_files.Damaged:
            damaged += 1
    if damaged:
        log.warning('%s: %d of %d lines are damaged and ignored', path, damaged, len(lines))
    return found


def model_flops(model: Flow) -> float:
    """Floating-point operations that one image costs in a train step, forward and backward.

    Two per multiply-add; the backward pass counts twice the forward one; causal attention counts
    the half that the mask leaves; recomputation is not counted.
    """
    (T, D), C = model.token_shape, model.width
    outputs = D if model.volume_preserving else 2 * D
    layer = 2 * T * 12 * C * C + 2 * T * T * C
    ends = 2 * T * (D + outputs) * C
    return 3.0 * sum(depth * layer + ends for depth in model.layers_per_block)
