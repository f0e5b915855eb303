"""What a run tells of its progress: speed, time left, and how long it compiled."""

import contextlib
import logging
import time

BETWEEN_LINES = 10  # seconds
# Without tqdm's time left, which jumps after every pause; the postfix has ours.
BAR = '{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]'

log = logging.getLogger(__name__)


@contextlib.contextmanager
def timed(what: str):
    """Says what is about to be done, and afterwards how long it took."""
    log.info('%s ...', what)
    start = time.perf_counter()
    yield
    log.info('%s took %.1f s', what, time.perf_counter() - start)


class Clock:
    """Measures the speed since the last reading, and the share of time spent waiting for data.

    Pauses do not count. The goodput does: since the clock was made, the share of time that went
    into steps rather than into restoring, compiling, waiting for data, validation, pictures and
    saving.
    """

    def __init__(self, batch_size: int, flops_per_image: float):
        self._batch_size, self._flops = batch_size, flops_per_image
        self._since = self._step = None
        self._waited = 0.0
        self._begin, self._lost = time.perf_counter(), 0.0
        self._steady: tuple[float, int] = self._begin, 0

    def steady(self, step: int) -> None:
        """Starts the first reading after this step, which compiled the program of the others."""
        self._since, self._step, self._waited = time.perf_counter(), step, 0.0
        self._steady = self._since, step

    def speed(self, step: int) -> dict[str, float]:
        """Reads the clock after a step; only the goodput is known if none passed since the last."""
        now, since, before = time.perf_counter(), self._since, self._step
        waited, self._waited = self._waited, 0.0
        self._since, self._step = now, step
        goodput = {'goodput': 1 - self._lost / (now - self._begin)}
        if since is None or step == before:
            return goodput
        rate = (step - before) * self._batch_size / (now - since)
        return {
            'images_per_second': rate,
            'model_flops_per_second': rate * self._flops,
            'data_wait': waited / (now - since),
            **goodput,
        }

    def left(self, step: int, total_steps: int) -> float | None:
        """Estimates the seconds that the remaining steps take, with pauses as there were so far."""
        since, first = self._steady
        if step == first:
            return None
        return (total_steps - step) * (time.perf_counter() - since) / (step - first)

    @contextlib.contextmanager
    def waiting(self):
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._waited += seconds
        self._lost += seconds

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._lost += seconds
        if self._since is not None:
            self._since += seconds


class Lines:
    """Logs lines of progress: the first, the last, and between them one in so many seconds."""

    def __init__(self, total_steps: int):
        self._total, self._told = total_steps, -float('inf')

    def __call__(self, step: int, scalars: dict, left: float | None) -> str:
        """Returns loss, speed and time left in words; logs them unless it is too early."""
        words = [f'loss {scalars["loss"]:.5g}']
        if 'images_per_second' in scalars:
            rate = scalars['images_per_second']
            words.append(f'{rate:,.0f} images/s' if rate >= 10 else f'{rate:.2g} images/s')
        if left is not None and step < self._total:
            words.append(f'{in_words(left)} left')
        now = time.perf_counter()
        if now - self._told >= BETWEEN_LINES or step == self._total:
            self._told = now
            log.info('step %d/%d: %s', step, self._total, ', '.join(words))
        return ', '.join(words)


def in_words(seconds: float) -> str:
    """Writes a duration in its two largest units, such as '3 h 20 min' or '45 s'."""
    rest = round(seconds)
    parts = []
    for unit, size in (('d', 86400), ('h', 3600), ('min', 60), ('s', 1)):
        count, rest = divmod(rest, size)
        parts.append((count, unit))
    first = next((i for i, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return ' '.join(f'{count} {unit}' for count, unit in parts[first : first + 2])
