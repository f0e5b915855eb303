"""Which checkpoint is the best: the one with the lowest validation loss."""

from collections.abc import Callable, Iterable

from tarflow_jax import json_files

NAME = 'best'  # stands for the best step wherever a step can be chosen
SHAPE = {'loss': float, 'of': dict}


def validations(folder, steps: Iterable[int]) -> dict[int, dict]:
    """Reads the validations of checkpoints, by step; those that were not validated have none.

    Args:
      folder: `<workdir>/checkpoints`.
    Returns:
      for each step its 'loss', and as 'of' all that the loss depends on beside the parameters.
    """
    found = {}
    for step in steps:
        path = folder / str(step) / 'about' / 'metadata'
        try:
            about = json_files.read(path, {'validation': SHAPE})
        except (OSError, json_files.Damaged):  # damage is reported when the checkpoint is restored
            continue
        found[step] = about['validation']
    return found


def best_of(validations: dict[int, dict]) -> int | None:
    """Returns the step with the lowest loss, among those validated as the newest step was."""
    if not validations:
        return None
    of = validations[max(validations)]['of']
    alike = [step for step, validation in validations.items() if validation['of'] == of]
    return min(alike, key=lambda step: (validations[step]['loss'], step))


class Preservation:
    """Tells Orbax which checkpoints to keep: the newest `count` and the best."""

    def __init__(self, count: int, best: Callable[[], int | None]):
        self._count, self._best = count, best

    def should_preserve(self, checkpoints, *, context):
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self._count :], self._best()}
        return [step in kept for step in steps]
