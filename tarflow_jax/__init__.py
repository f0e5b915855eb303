"""tarflow_jax: TarFlow, a normalizing flow of causal Transformers, in JAX and Flax Linen."""

import os
from typing import Any

from tarflow_jax.flow.calibration import calibrate
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.likelihood import bits_per_dim, denoise, latent_log_prob, log_prob
from tarflow_jax.flow.model import TarFlow, Variables
from tarflow_jax.flow.sampling import SampleInfo, sample, sample_trajectory
from tarflow_jax.flow.schedule import Schedule

__version__ = '0.1.0'


def load_official(path: str | os.PathLike[str], model: TarFlow) -> dict[str, Any]:
    """See `tarflow_jax.convert.load_official`."""
    from tarflow_jax import convert

    return convert.load_official(path, model)


def save_official(
    variables: Variables, model: TarFlow, path: str | os.PathLike[str]
) -> None:
    """See `tarflow_jax.convert.save_official`."""
    from tarflow_jax import convert

    convert.save_official(variables, model, path)


__all__ = [
    'Guidance',
    'SampleInfo',
    'Schedule',
    'TarFlow',
    'bits_per_dim',
    'calibrate',
    'denoise',
    'latent_log_prob',
    'load_official',
    'log_prob',
    'sample',
    'sample_trajectory',
    'save_official',
]
