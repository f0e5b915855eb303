"""Checkpoints: the train state with Orbax, asynchronous and atomic, and what it belongs to.

A checkpoint is a folder `<workdir>/checkpoints/<step>`. Orbax writes it under a temporary name and
renames it when complete, so that a run killed while writing leaves the checkpoint before it.

Orbax does not notice all damage: a flipped bit in an array is read as another number. So a
checksum of every array is saved beside it, and compared with that of what was read.
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
from tarflow_jax.training import digests
from tarflow_jax.training.processes import by_first, from_any, from_first
from tarflow_jax.training.state import TrainState, variables_of

KEPT = 2
AGAIN_AFTER = 0.5  # seconds: a run deletes its older checkpoints while others read them
_SMALL = 2**20  # bytes
_WEIGHTS = ('params', 'ema_params', 'prior')
_PROGRESS = ('step', 'opt_state', 'skipped')


_TRIES = 20
_ABOUT = {
    'model': dict, 'config': dict, 'arrays?': {str: str},
    'data?': {'class_names?': (None, [str]), 'kind?': (None, str)},
}

log = logging.getLogger(__name__)


class CheckpointError(OSError):
    """A checkpoint could not be written, and the ones before it are whole."""


class Unreadable(CheckpointError):
    """No checkpoint can be read, or not the one that was asked for."""


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for pending writes.

    Entered with a config, it holds the workdir: see `lock`.

    Args:
      workdir: folder of the run; nothing is created before the first save.
      model: whose parameters they hold.
      config: saved beside the state, as a dict of JSON values; None only reads, and leaves alone
        what another process may be writing there.
      data: saved beside the state: which set the flow is trained on, as a dict of JSON values.

    Raises:
      ValueError: if the newest checkpoint there is of another model.
      Unreadable: if all are damaged, as from everything here that reads one. Where only the newest
        is, a warning says so, and the one before it takes its place.
      Taken: with a config, if another process writes to the workdir; as from entering it.
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
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=KEPT,
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
        """Step of the newest complete checkpoint that is not known to be damaged, or None.

        Where this only reads, that which was read, whatever a run may be writing meanwhile.
        """
        if self._read is not None:
            return self._read
        return max(set(self._manager.all_steps()) - self._damaged, default=None)

    def about(self, step: int | None = None) -> dict:
        """What was saved beside the state: 'model', 'config' and 'data', each a dict.

        Checkpoints of version 0.1 have no 'data'.
        """
        about = self._newest(self._read_about, step)
        return {name: value for name, value in about.items() if name != 'arrays'}

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
                    '--workdir or the config it was trained with.'
                )

    def save(self, state: TrainState) -> None:
        """Starts writing the state; returns once it is copied from the devices.

        Raises:
          CheckpointError: if there is no room for it, or the one before could not be written.
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
        """Returns once everything is on disk; raises CheckpointError if it could not be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(_reason(error)) from error

    def _failure(self, reason: str) -> CheckpointError:
        kept = [s for s in self._manager.all_steps() if (self.folder / str(s)).is_dir()]
        before = f'the one at step {max(kept)} is intact' if kept else 'there is none before it'
        return CheckpointError(
            f'a checkpoint could not be written to {self.folder}: {reason}; {before}; make room if '
            'the disk is full, and start again with the same command.'
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (default: the newest), placed as the abstract state says.

        Where this writes to the workdir, damaged checkpoints that are newer are renamed.
        """
        parts = _parts(abstract)
        found = self._newest(lambda step: self._read_arrays(step, lambda: parts), step)
        if self._writes:
            self._set_aside()
        empty = dict.fromkeys(TrainState._fields)
        return TrainState(**{**empty, **found['weights'], **found['progress']})

    def restore_variables(self, place: Callable, step: int | None = None) -> dict:
        """What `model.apply` takes: the averaged parameters if there are any, else the plain ones.

        Args:
          place: gives the leaves of an abstract tree of variables their shardings.
        """
        def saved(step: int) -> dict:
            folder = self.folder / str(step) / 'weights'
            tree = ocp.StandardCheckpointHandler().metadata(folder).tree
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(tree))
            return {'weights': place(abstract)}

        read = lambda step: self._read_arrays(step, lambda: saved(step))  # noqa: E731
        found = self._newest(read, step)['weights']
        return variables_of(found.get('ema_params', found['params']), found.get('prior'))

    # Reading. What a process finds wrong counts for all: none may wait for one that gave up.

    def _newest(self, read: Callable, step: int | None):
        """`read(step)` of the newest checkpoint that can be read, or of the given one."""
        given, tries = step is not None, 0
        while True:
            step = step if given else from_first(self.latest())
            if step is None:
                raise FileNotFoundError(
                    f'{self.folder} holds no checkpoint; train first, or give --workdir the folder '
                    'of a run.'
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
                    raise Unreadable(f'{error}; copy it again if there is a copy.') from error
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
        """Takes a checkpoint for damaged; raises the error if there is none before it."""
        older = [s for s in self._manager.all_steps() if s < step and s not in self._damaged]
        if from_first(not older):
            raise Unreadable(
                f'{error}, and there is no other that can be; copy it again if there is a copy, or '
                f'delete {self.folder} to begin anew.'
            ) from error
        self._damaged.add(step)
        log.warning('%s; going on from the one at step %d', error.args[0], from_first(max(older)))

    def _read_about(self, step: int) -> dict:
        path = self.folder / str(step) / 'about' / 'metadata'
        return self._agreed(step, lambda: json_files.read(path, _ABOUT))

    def _read_arrays(self, step: int, abstract: Callable[[], dict]) -> dict:
        """What Orbax reads, compared with what was saved."""
        saved = self._read_about(step).get('arrays')  # which version 0.1 did not write
        parts = self._agreed(step, abstract)

        def compare(found: dict[str, str]) -> None:
            # Of what was saved, the same parts, and as much as `found` says of each array.
            for name in found.keys() | (k for k in saved or () if k.partition('/')[0] in parts):
                if saved is None or saved.get(name, '').startswith(found.get(name, '?')):
                    continue
                raise ValueError(f'{name} is not the array that was saved')

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
        """What the action returns; Unreadable on every process if it raises on any."""
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
        """Renames what was found to be damaged: its place is for a new one of that step."""
        for step in sorted(self._damaged):
            path = self.folder / str(step)
            aside = path.with_name(f'{step}.damaged')
            log.warning('%s is called %s now; delete it once you need nothing of it', path, aside)

            def rename(path=path, aside=aside):
                paths.remove_tree(aside)
                path.rename(aside)

            by_first(rename)
        self._damaged.clear()
        self._manager.reload()


def _parts(state: TrainState) -> dict[str, dict]:
    """What is saved of a state in each item."""
    fields = {name: value for name, value in state._asdict().items() if value is not None}
    return {
        item: {name: fields[name] for name in names if name in fields}
        for item, names in (('weights', _WEIGHTS), ('progress', _PROGRESS))
    }


def _from_one_device(leaf):
    """Takes a small array that all devices hold from one of them.

    Orbax would have each device write a part of it, and compile a program per part.
    """
    if not isinstance(leaf, jax.Array) or leaf.nbytes >= _SMALL:
        return leaf
    of_this_process = leaf.is_fully_replicated and leaf.is_fully_addressable
    return leaf.addressable_data(0) if of_this_process else leaf


def _reason(error: Exception) -> str:
    """The end of an error's first line, where Orbax has the cause behind file names."""
    line = str(error).strip().partition('\n')[0] or type(error).__name__
    line = line.partition(' [source locations=')[0]  # of TensorStore
    # Which may have the cause anywhere.
    cause = re.search(r'OS error \d+: (?:[A-Z]+ )?([A-Z][\w ]+)', line)
    if len(line) > 200:
        line = f'{cause[1]}: ... {line[-200:]}' if cause else f'... {line[-200:]}'
    return line
