"""Traces some train steps for TensorBoard's profiler (xprof) and Perfetto."""

import contextlib
import logging
import re

import jax

log = logging.getLogger(__name__)


def steps_of(text: str, total_steps: int) -> range:
    """Parses --profile_steps=START:END; both ends are included.

    Raises:
      ValueError: if the text is not of this form, or the run has fewer steps.
    """
    found = re.fullmatch(r'(\d{1,9}):(\d{1,9})', text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(
            f'--profile_steps={text} is not START:END; give the first and the last step, counted '
            'from 1, such as --profile_steps=100:104.'
        )
    if int(found[2]) > total_steps:
        raise ValueError(
            f'--profile_steps={text} ends after step {total_steps}, the last of the run; choose an '
            f'END of at most {total_steps}.'
        )
    return range(int(found[1]), int(found[2]) + 1)


class Profile:
    """Traces a range of steps, or the part of it that this process runs.

    Args:
      steps: consecutive steps; an empty range traces nothing.
      folder: gets `plugins/profile/TIME/` with a file for each host, where TensorBoard looks.
    """

    def __init__(self, steps: range, folder):
        self._steps, self._folder, self._tracing = steps, str(folder), False

    @contextlib.contextmanager
    def step(self, step: int):
        """Wraps the dispatch of a step; starts the trace before its first step."""
        if step in self._steps and not self._tracing:
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            yield

    def after(self, step: int, result) -> None:
        """Ends the trace once the devices have finished its last step."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes the trace, unless that is done already."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
            log.info(
                'the trace is in %s/plugins/profile: tensorboard --logdir=%s (pip install xprof)',
                self._folder, self._folder,
            )
