"""Writes metrics and pictures to `metrics.jsonl` and TensorBoard event files."""

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
BETWEEN_UPLOADS = 60  # seconds; a checkpoint uploads at once

log = logging.getLogger(__name__)
# It would warn of every number that is not finite, of which a diverging run has many.
logging.getLogger('tensorboardX.x2num').setLevel(logging.ERROR)


class MetricWriter:
    """Writes scalars and images; its methods are named as those of clu's MetricWriter.

    clu's own writer needs TensorFlow. tensorboardX's SummaryWriter writes in a thread, and training
    would hang if that failed; so this writes the events itself.

    A resumed run drops the entries after its checkpoint, so that the files read as if it had never
    been interrupted.

    Files in a bucket cannot be appended to. For a bucket this writes to the local disk, and uploads
    all of `metrics.jsonl` with every checkpoint and once a minute. With every checkpoint the events
    since the previous one are uploaded as an event file of their own.

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
        # TensorBoard then drops what older files hold from this step on.
        self._write_event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        if self._uploads:
            self._upload_metrics()

    def _new_events(self) -> EventsWriter:
        # The name holds the time in seconds only; the suffix tells quick restarts apart.
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

    def _write_event(self, step: int, wall_time: float | None = None, **content) -> None:
        self._new = True
        wall_time = time.time() if wall_time is None else wall_time
        self._events.write_event(Event(wall_time=wall_time, step=step, **content))

    def write_scalars(self, step: int, scalars: dict) -> None:
        """Writes numbers by name, with the time in seconds since 1970 as `wall_time`."""
        now = time.time()
        scalars = {name: float(value) for name, value in scalars.items()}
        self._jsonl.write(json.dumps({'step': step, 'wall_time': now, **scalars}) + '\n')
        self._jsonl.flush()
        if self._uploads and time.monotonic() - self._uploaded > BETWEEN_UPLOADS:
            self._upload_metrics()
        for name, value in scalars.items():
            self._write_event(step, now, summary=summary.scalar(name, value))

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        """Writes pictures by name, each uint8 [H, W, C]."""
        for name, image in images.items():
            self._write_event(step, summary=summary.image(name, image, dataformats='HWC'))

    def flush(self) -> None:
        """Flushes to disk; call it before saving the checkpoint of the same step."""
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
    """A MetricWriter that writes nothing, for all processes but the first."""

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
    """Reads the lines of metrics.jsonl; skips damaged ones, such as half a line of a killed run."""
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
        log.warning('%s: ignored %d damaged lines of %d', path, damaged, len(lines))
    return found


def model_flops(model: Flow) -> float:
    """Counts the floating-point operations of a train step per image, forward and backward.

    A multiply-add counts as two, the backward pass as two forward passes, and causal attention by
    the half that the mask leaves. Recomputation does not count.
    """
    (T, D), C = model.token_shape, model.width
    outputs = D if model.volume_preserving else 2 * D
    layer = 2 * T * 12 * C * C + 2 * T * T * C
    ends = 2 * T * (D + outputs) * C
    return 3.0 * sum(depth * layer + ends for depth in model.layers_per_block)
