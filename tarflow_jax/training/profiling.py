"""A trace of some train steps, which TensorBoard's profiler (xprof) and Perfetto open."""

import contextlib
import logging
import re

import jax

log = logging.getLogger(__name__)


def steps_of(text: str, total_steps: int) -> range:
    """The steps that --profile_steps=START:END means, both of them included.

    Raises:
      ValueError: if it means none, or steps that the run does not have.
    """
    found = re.fullmatch(r'(\d{1,9}):(\d{1,9})', text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(
            f'--profile_steps={text} does not name steps; give the first and the last, counted '
            'from 1, such as --profile_steps=100:104.'
        )
    if int(found[2]) > total_steps:
        raise ValueError(
            f'--profile_steps={text}: the run has {total_steps} steps; choose an END of at most '
            f'{total_steps}.'
        )
    return range(int(found[1]), int(found[2]) + 1)


class Profile:
    """Traces those of the steps that this process makes.

    Args:
      steps: in a row; none traces nothing.
      folder: gets plugins/profile/TIME/, with a file of each host, as TensorBoard looks for it.
    """

    def __init__(self, steps: range, folder):
        self._steps, self._folder, self._tracing = steps, str(folder), False

    @contextlib.contextmanager
    def step(self, step: int):
        """Around the dispatch of a step."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            yield

    def after(self, step: int, result) -> None:
        """Ends the trace behind the last of its steps, when the devices have done it."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what was traced, if it was not written yet."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            log.info(
                'the trace is in %s/plugins/profile: tensorboard --logdir=%s (pip install xprof)',
                self._folder, self._folder,
            )
