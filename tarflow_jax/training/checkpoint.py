"""Checkpoints: the train state with Orbax, asynchronous and atomic, and what it belongs to.

A checkpoint is a folder `<workdir>/checkpoints/<step>`. Orbax writes it under a temporary name and
renames it when complete, so that a run killed while writing leaves the checkpoint before it.
"""

import contextlib
import shutil
from collections.abc import Callable

import jax
import orbax.checkpoint as ocp

from tarflow_jax import paths
from tarflow_jax.flow.flow import Flow, architecture, field_defaults
from tarflow_jax.training import lock
from tarflow_jax.training.state import TrainState, variables_of

KEPT = 2
_SMALL = 2**20  # bytes
_WEIGHTS = ('params', 'ema_params', 'prior')
_PROGRESS = ('step', 'opt_state', 'skipped')


class CheckpointError(OSError):
    """A checkpoint could not be written, and the ones before it are whole; or it cannot be read."""


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
      CheckpointError: if it is damaged, as from everything here that reads one.
      Taken: with a config, if another process writes to the workdir; as from entering it.
    """

    def __init__(
        self, workdir, model: Flow, config: dict | None = None, data: dict | None = None
    ):
        self.folder = paths.absolute(workdir) / 'checkpoints'
        self._held = contextlib.ExitStack()
        self._writes = config is not None
        if self._writes:
            lock.check(workdir)  # before the cleaning below
        self._model = model
        self._about = {
            'model': architecture(model), 'config': config or {}, 'data': data or {}
        }
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
            self._held.enter_context(lock.held(self.folder.parent))
        return self

    def __exit__(self, *_):
        with self._held:
            try:
                self._manager.close()
            except Exception as error:
                raise self._failure(_reason(error)) from error

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def about(self, step: int | None = None) -> dict:
        """What was saved beside the state: 'model', 'config' and 'data', each a dict.

        Checkpoints of version 0.1 have no 'data'.
        """
        step = self._existing(step)
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        with self._reading(step):
            return self._manager.restore(step, args=args)['about']

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
        state = jax.tree.map(_from_one_device, state)
        part = lambda names: ocp.args.StandardSave(  # noqa: E731
            {k: v for k, v in state._asdict().items() if k in names and v is not None}
        )
        args = ocp.args.Composite(
            weights=part(_WEIGHTS), progress=part(_PROGRESS), about=ocp.args.JsonSave(self._about)
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

    @contextlib.contextmanager
    def _reading(self, step: int):
        try:
            yield
        except Exception as error:  # Orbax answers damage with anything from KeyError on
            raise CheckpointError(
                f'the checkpoint {self.folder / str(step)} cannot be read ({_reason(error)}); '
                'delete this folder if it is damaged, to go on from the one before it.'
            ) from error

    def _existing(self, step: int | None) -> int:
        step = self.latest() if step is None else step
        if step is None:
            raise FileNotFoundError(
                f'{self.folder} holds no checkpoint; train first, or give --workdir the folder of '
                'a run.'
            )
        return step

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (default: the newest), placed as the abstract state says."""
        step = self._existing(step)
        part = lambda names: ocp.args.StandardRestore(  # noqa: E731
            {k: v for k, v in abstract._asdict().items() if k in names and v is not None}
        )
        args = ocp.args.Composite(weights=part(_WEIGHTS), progress=part(_PROGRESS))
        with self._reading(step):
            found = self._manager.restore(step, args=args)
        empty = dict.fromkeys(TrainState._fields)
        return TrainState(**{**empty, **found['weights'], **found['progress']})

    def restore_variables(self, place: Callable, step: int | None = None) -> dict:
        """What `model.apply` takes: the averaged parameters if there are any, else the plain ones.

        Args:
          place: gives the leaves of an abstract tree of variables their shardings.
        """
        step = self._existing(step)
        with self._reading(step):
            saved = self._manager.item_metadata(step)['weights'].tree
            abstract = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), dict(saved))
            args = ocp.args.Composite(weights=ocp.args.StandardRestore(place(abstract)))
            found = self._manager.restore(step, args=args)['weights']
        return variables_of(found.get('ema_params', found['params']), found.get('prior'))


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
    return line if len(line) <= 200 else f'... {line[-200:]}'
