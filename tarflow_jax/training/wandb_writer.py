"""Sends metrics and pictures to Weights & Biases too; optional, needs the extra `wandb`."""

import importlib.util
import secrets

import numpy as np

from tarflow_jax import files
from tarflow_jax.training.metrics import MetricWriter

FILE = 'wandb_run'  # in the workdir: the id with which a later process resumes the run


def check(project: str) -> None:
    """Raises ValueError if the package is missing."""
    if importlib.util.find_spec('wandb') is None:
        raise ValueError(
            f'train.wandb_project {project!r} needs the package wandb; install it with pip install '
            "'tarflow-jax[wandb]', or leave the field empty."
        )


class WandbWriter:
    """A MetricWriter that also logs to a run of Weights & Biases.

    WANDB_MODE=offline keeps the run in the workdir, for `wandb sync`. A resumed run repeats the
    steps after its checkpoint with the same numbers; Weights & Biases keeps the first ones.

    Args:
      writer: writes the files.
      workdir: holds the id of the run.
      config: shown with the run, a dict.
    """

    def __init__(self, writer: MetricWriter, project: str, workdir, config: dict):
        import wandb

        self._files, self._wandb = writer, wandb
        if not (workdir / FILE).exists():
            files.write_text(workdir / FILE, secrets.token_hex(8) + '\n')
        folder = None if '://' in str(workdir) else str(workdir)
        self._run = wandb.init(
            project=project, name=workdir.name, id=(workdir / FILE).read_text().strip(),
            resume='allow', config=config, dir=folder,
        )

    def write_scalars(self, step: int, scalars: dict) -> None:
        self._files.write_scalars(step, scalars)
        self._run.log({name: float(value) for name, value in scalars.items()}, step=step)

    def write_images(self, step: int, images: dict[str, np.ndarray]) -> None:
        self._files.write_images(step, images)
        shown = {
            name: self._wandb.Image(image.squeeze(-1) if image.shape[-1] == 1 else image)
            for name, image in images.items()
        }
        self._run.log(shown, step=step)

    def flush(self) -> None:
        self._files.flush()

    def close(self) -> None:
        self._files.close()
        self._run.finish()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
