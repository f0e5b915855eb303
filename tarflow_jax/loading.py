"""Loads a run of the command line into Python: its flow, its parameters, its config."""

import functools

import jax
from ml_collections import ConfigDict

from tarflow_jax import config as configs
from tarflow_jax import config_of_run, paths
from tarflow_jax.flow.flow import TarFlow, Variables
from tarflow_jax.training import sharding
from tarflow_jax.training.checkpoint import Checkpoints


def load(workdir: str, step: int | str | None = None) -> tuple[TarFlow, Variables]:
    """Loads the flow of a run and its parameters, the averaged ones if there are any.

        model, variables = tfj.load('runs/fashion_mnist')

    The parameters are put on the first device of this process, even if other devices saved them.
    Use `jax.device_put` to move them.

    Args:
      workdir: folder of the run, on a disk or gs://BUCKET/FOLDER.
      step: of the checkpoint. None is the newest that is not damaged; 'best' is the one with the
        lowest validation loss.
    Raises:
      FileNotFoundError: if there is no such checkpoint.
      ValueError: if the workdir cannot be read or its config is not understood.
      OSError: if all checkpoints are damaged.
    """
    model = configs.plan(load_config(workdir, step)).model
    mesh = sharding.make_mesh(devices=jax.local_devices()[:1])
    with Checkpoints(_resolved(workdir), model) as checkpoints:
        place = functools.partial(sharding.placed, mesh=mesh)
        variables = checkpoints.restore_variables(place, checkpoints.named(step))
    return model, jax.device_put(variables, jax.local_devices()[0])


def load_config(workdir: str, step: int | str | None = None) -> ConfigDict:
    """Loads the config of a run; fields that its checkpoint lacks keep their default.

    Args:
      step: of the checkpoint, as for `load`.
    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if the workdir cannot be read.
    """
    saved = config_of_run.saved(_resolved(workdir), step)
    if saved is None:
        raise FileNotFoundError(
            f'{workdir} has no checkpoint with a config; pass the --workdir of a run.'
        )
    return config_of_run.whole(saved, training=False)


def _resolved(workdir: str) -> str:
    folder = paths.resolved(str(workdir), f'workdir {workdir}', 'folder')
    paths.reach(folder, f'workdir {workdir}', write=False)
    return folder
