"""Saves and restores the train state with Orbax: asynchronously, atomically, checked.

A checkpoint is a folder `<workdir>/checkpoints/<step>`. Orbax writes it under a temporary name and
renames it when complete, so that a run killed while writing leaves the previous checkpoint intact.
The newest two are kept, and the best: the one with the lowest validation loss.

Orbax does not notice all damage: an array with a flipped bit is restored without an error. So a
checksum of every array is saved beside it, and compared with that of the restored array.
"""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp

from tarflow_jax import json_files, lock, paths
from tarflow_jax.flow.flow import Flow, architecture, field_defaults
from tarflow_jax.training import best_checkpoint, digests
from tarflow_jax.training.processes import by_first, from_any, from_first
from tarflow_jax.training.state import TrainState, variables_of

KEPT = 2  # the newest ones; the best is kept too
AGAIN_AFTER = 0.5  # seconds: a run deletes its older checkpoints while others read them
_SMALL = 2**20  # bytes
_WEIGHTS = ('params', 'ema_params', 'prior')
_PROGRESS = ('step', 'opt_state', 'skipped')

_TRIES = 20
_ABOUT = {
    'model': dict, 'config': dict, 'arrays?': {str: str},
    'data?': {'class_names?': (None, [str]), 'kind?': (None, str)},
    'validation?': best_checkpoint.SHAPE,
}

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written; earlier ones are intact."""


class Unreadable(CheckpointError):
    """No checkpoint can be read, or the requested one cannot."""


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for pending writes.

    With a config, it locks the workdir while entered: see `lock`.

    Args:
      workdir: folder of the run; nothing is created before the first save.
      model: the flow whose parameters the checkpoints hold.
      config: saved beside the state, as a dict of JSON values. None opens the checkpoints for
        reading only, and leaves alone what another process may be writing.
      data: saved beside the state: which set the flow is trained on, as a dict of JSON values.

    Raises:
      ValueError: if the newest checkpoint is of another model.
      Unreadable: if all checkpoints are damaged; every method that reads one raises it. If only the
        newest is damaged, a warning says so, and the previous one takes its place.
      Taken: with a config, if another process writes to the workdir; entering raises it too.
    """

    def __init__(
        self, workdir, model: Flow, config: dict | None = None, data: dict | None = None
    ):
        self.folder = paths.absolute(workdir) / 'checkpoints'
        self._held = contextlib.ExitStack()
        self._writes = config is not None
        if self._writes:
            lock.check(workdir, by_first)  # before the cleaning below
        self._model = model
        self._about = {
            'model': architecture(model), 'config': config or {}, 'data': data or {}
        }
        self._damaged: set[int] = set()
        self._read: int | None = None
        self._validations: dict[int, dict] | None = None
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=best_checkpoint.Preservation(KEPT, self.best),
                cleanup_tmp_directories=self._writes and self.folder.exists(),
                create=False,
            ),
            item_handlers={
                'weights': ocp.StandardCheckpointHandler(),
                'progress': ocp.StandardCheckpointHandler(),
                'about': ocp.JsonCheckpointHandler(),
            },
        )
        self._check()

    def __enter__(self):
        if self._writes:
            self._held.enter_context(lock.held(self.folder.parent, by_first))
        return self

    def __exit__(self, *_):
        with self._held:
            try:
                self._manager.close()
            except Exception as error:
                raise self._failure(_reason(error)) from error

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint not known to be damaged, or None.

        When only reading, it stays the step that was read, whatever a run writes meanwhile.
        """
        if self._read is not None:
            return self._read
        return max(self._steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the checkpoint with the lowest validation loss, or None.

        Only checkpoints count that were validated as the newest validated one: on the same images,
        with the same noise.
        """
        steps = self._steps()
        return best_checkpoint.best_of(
            {step: found for step, found in self._validated().items() if step in steps}
        )

    def named(self, step: int | str | None) -> int | None:
        """Returns the step that the number of a step, 'best' or None (the newest) stands for.

        Raises:
          FileNotFoundError: if there is no such checkpoint.
        """
        if step is None:
            return None
        there = sorted(self._steps())
        if step == best_checkpoint.NAME:
            found = self.best()
            if found is None and there:
                raise FileNotFoundError(
                    f'{self.folder} has no best checkpoint, as none was validated; choose one of '
                    f'the steps {", ".join(map(str, there))}, or train with train.validate_every '
                    'above 0.'
                )
            return found
        if step not in there:
            raise FileNotFoundError(
                f'{self.folder} holds no checkpoint at step {step}; '
                + (f'there are {", ".join(map(str, there))}.' if there else 'it holds none.')
            )
        return step

    def about(self, step: int | None = None) -> dict:
        """Returns what was saved beside the state: 'model', 'config' and 'data', each a dict.

        A checkpoint that was validated has 'validation' too. Those of version 0.1 have no 'data'.
        """
        about = self._newest(self._read_about, step)
        return {name: value for name, value in about.items() if name != 'arrays'}

    def _validated(self) -> dict[int, dict]:
        if self._validations is None:
            saved = best_checkpoint.validations(self.folder, self._manager.all_steps())
            self._validations = from_first(saved)
        return self._validations

    def _steps(self) -> set[int]:
        return set(self._manager.all_steps()) - self._damaged

    def _check(self) -> None:
        if self.latest() is None:
            return
        # A field that the first version did not have has its default there.
        there = field_defaults(self._model) | self.about()['model']
        here = self._about['model']
        for field in here:
            if there.get(field) != here[field]:
                raise ValueError(
                    f'{self.folder} holds a checkpoint of another model: model.{field} is '
                    f'{there.get(field)} there and {here[field]} in this config; choose another '
                    '--workdir, or the config it was trained with.'
                )

    def save(self, state: TrainState, validation: dict | None = None) -> None:
        """Starts writing the state; returns once it is copied from the devices.

        Args:
          validation: the state's finite 'loss', and as 'of' what it can be compared by, as JSON
            values; None if the state was not validated.
        Raises:
          CheckpointError: if the disk is full, or the previous checkpoint could not be written.
        """
        step = int(state.step)
        if not paths.in_bucket(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise self._failure(
                    f'step {step} needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are '
                    'free'
                )
        about = self._about | {'arrays': digests.digests(_parts(state))}
        validated = self._validated()  # all processes read it now, not somewhere within Orbax
        validated.pop(step, None)  # of a damaged one that was at this step
        if validation is not None:
            about['validation'] = validated[step] = validation
        parts = _parts(jax.tree.map(_from_one_device, state))
        items = {item: ocp.args.StandardSave(parts[item]) for item in parts}
        args = ocp.args.Composite(
            about=ocp.args.JsonSave(json_files.sealed(about)), **items
        )
        try:
            self._manager.save(step, args=args)
        except Exception as error:  # Orbax passes on whatever its storage threads raise
            raise self._failure(_reason(error)) from error

    def delete(self, step: int) -> None:
        """Deletes the checkpoint of a step."""
        self._manager.delete(step)

    def wait(self) -> None:
        """Waits until everything is on disk; raises CheckpointError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(_reason(error)) from error

    def _failure(self, reason: str) -> CheckpointError:
        kept = [s for s in self._manager.all_steps() if (self.folder / str(s)).is_dir()]
        before = f'the one at step {max(kept)} is intact' if kept else 'there is no earlier one'
        return CheckpointError(
            f'a checkpoint could not be written to {self.folder}: {reason}; {before}; free some '
            'space if the disk is full, and start the same command again.'
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """Restores the state at `step` (default: the newest), sharded like the abstract state.

        With a config, newer checkpoints that are damaged are renamed.
        """
        parts = _parts(abstract)
        found = self._newest(lambda step: self._read_arrays(step, lambda: parts), step)
        if self._writes:
            self._set_aside()
        empty = dict.fromkeys(TrainState._fields)
        return TrainState(**{**empty, **found['weights'], **found['progress']})

    def restore_variables(self, place: Callable, step: int | None = None) -> dict:
        """Restores what `model.apply` takes: the averaged parameters if any, else the plain ones.

        Args:
          place: adds shardings to the leaves of an abstract tree of variables.
        """
        def saved(step: int) -> dict:
            folder = self.folder / str(step) / 'weights'
            tree = ocp.StandardCheckpointHandler().metadata(folder).tree
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(tree))
            return {'weights': place(abstract)}

        read = lambda step: self._read_arrays(step, lambda: saved(step))  # noqa: E731
        found = self._newest(read, step)['weights']
        return variables_of(found.get('ema_params', found['params']), found.get('prior'))

    # Reading. An error of one process is raised on all: none may wait for one that gave up.

    def _newest(self, read: Callable, step: int | None):
        """Returns `read(step)` of the newest readable checkpoint, or of the given one."""
        given, tries = step is not None, 0
        while True:
            step = step if given else from_first(self.latest())
            if step is None:
                raise FileNotFoundError(
                    f'{self.folder} holds no checkpoint; train first, or set --workdir to the '
                    'folder of a run.'
                )
            try:
                found = read(step)
            except Unreadable as error:
                tries += 1
                time.sleep(AGAIN_AFTER)
                there = from_first((self.folder / str(step)).is_dir())
                if tries == 1 and there:
                    continue
                if given or tries == _TRIES:
                    raise Unreadable(f'{error}; restore it from a copy if you have one.') from error
                if there:
                    self._pass_over(step, error)
                    tries = 0
                self._read = None
                self._manager.reload()
                continue
            if not (given or self._writes):
                self._read = step
            return found

    def _pass_over(self, step: int, error: Unreadable) -> None:
        """Marks a checkpoint as damaged; raises the error if no earlier one is left."""
        older = [s for s in self._steps() if s < step]
        if from_first(not older):
            raise Unreadable(
                f'{error}, and no earlier one is left; restore it from a copy if you have one, or '
                f'delete {self.folder} to start over.'
            ) from error
        self._damaged.add(step)
        log.warning('%s; using the one at step %d', error.args[0], from_first(max(older)))

    def _read_about(self, step: int) -> dict:
        path = self.folder / str(step) / 'about' / 'metadata'
        return self._agreed(step, lambda: json_files.read(path, _ABOUT))

    def _read_arrays(self, step: int, abstract: Callable[[], dict]) -> dict:
        """Restores arrays with Orbax, and compares them with the checksums that were saved."""
        saved = self._read_about(step).get('arrays')  # which version 0.1 did not write
        parts = self._agreed(step, abstract)

        def compare(found: dict[str, str]) -> None:
            # Every array of these parts must be there; `found` may leave its checksum out.
            for name in found.keys() | (k for k in saved or () if k.partition('/')[0] in parts):
                if saved is None or saved.get(name, '').startswith(found.get(name, '?')):
                    continue
                raise ValueError(f'{name} differs from the array that was saved')

        def load() -> dict:
            compare(digests.kinds(parts))
            return {
                item: ocp.StandardCheckpointHandler().restore(
                    self.folder / str(step) / item, args=ocp.args.StandardRestore(part)
                )
                for item, part in parts.items()
            }

        found = self._agreed(step, load)
        if saved is not None:
            self._agreed(step, lambda: compare(digests.digests(found)))
        return found

    def _agreed(self, step: int, action: Callable):
        """Returns the action's result; raises Unreadable on all processes if it fails on any."""
        result, problem, cause = None, None, None
        try:
            result = action()
        except Exception as error:  # Orbax answers damage with anything from KeyError on
            problem, cause = _reason(error), error
        problem = from_any(problem)
        if problem is not None:
            raise Unreadable(
                f'the checkpoint {self.folder / str(step)} is damaged or cannot be read ({problem})'
            ) from cause
        return result

    def _set_aside(self) -> None:
        """Renames damaged checkpoints, so that new ones can take their steps."""
        for step in sorted(self._damaged):
            path = self.folder / str(step)
            aside = path.with_name(f'{step}.damaged')
            log.warning('renamed %s to %s; delete it when you no longer need it', path, aside)

            def rename(path=path, aside=aside):
                paths.remove_tree(aside)
                path.rename(aside)

            by_first(rename)
        self._damaged.clear()
        self._manager.reload()


def _parts(state: TrainState) -> dict[str, dict]:
    """Returns the parts of a state by the item of the checkpoint that holds them."""
    fields = {name: value for name, value in state._asdict().items() if value is not None}
    return {
        item: {name: fields[name] for name in names if name in fields}
        for item, names in (('weights', _WEIGHTS), ('progress', _PROGRESS))
    }


def _from_one_device(leaf):
    """Takes a small replicated array from one device.

    Orbax would let each device write a part of it, and compile a program per part.
    """
    if not isinstance(leaf, jax.Array) or leaf.nbytes >= _SMALL:
        return leaf
    of_this_process = leaf.is_fully_replicated and leaf.is_fully_addressable
    return leaf.addressable_data(0) if of_this_process else leaf


def _reason(error: Exception) -> str:
    """Returns the end of an error's first line: Orbax puts the cause after file names."""
    line = str(error).strip().partition('\n')[0] or type(error).__name__
    line = line.partition(' [source locations=')[0]  # of TensorStore
    # TensorStore may name the cause anywhere.
    cause = re.search(r'OS error \d+: (?:[A-Z]+ )?([A-Z][\w ]+)', line)
    if len(line) > 200:
        line = f'{cause[1]}: ... {line[-200:]}' if cause else f'... {line[-200:]}'
    return line
