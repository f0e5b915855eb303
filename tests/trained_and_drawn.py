"""Trains by the command line in this process, then draws images and saves them unrounded.

    python trained_and_drawn.py IMAGES.npy FLAGS...
"""

import functools
import sys

import jax
import numpy as np
from command_line import call

from tarflow_jax import command_setup, main
from tarflow_jax.training import pictures, sharding
from tarflow_jax.training.checkpoint import Checkpoints


def run(file, *flags) -> int:
    """Returns the exit code of the training."""
    code = call(*flags)
    if code:
        return code
    given = main._parse(['main', *flags])
    plan, mesh = command_setup.plan_of(given.config)
    with Checkpoints(given.workdir, plan.model) as checkpoints:
        variables = checkpoints.restore_variables(functools.partial(sharding.placed, mesh=mesh))
    images = pictures.draw(
        plan, variables, jax.random.key(7), 11, mesh=mesh, guidance=plan.guidance
    )
    if jax.process_index() == 0:
        np.save(file, images['denoised'])
    return 0


if __name__ == '__main__':
    sys.exit(run(*sys.argv[1:]))
