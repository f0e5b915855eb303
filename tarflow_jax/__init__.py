"""tarflow_jax: TarFlow, a normalizing flow of causal Transformers, in JAX and Flax Linen."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tarflow_jax.animation import animate
    from tarflow_jax.convert import load_official, save_official
    from tarflow_jax.flow.condition import Condition
    from tarflow_jax.flow.denoising import denoise, iterative_denoise
    from tarflow_jax.flow.flow import SequenceFlow, TarFlow
    from tarflow_jax.flow.guidance import Guidance
    from tarflow_jax.flow.likelihood import bits_per_dim, latent_log_prob, log_prob
    from tarflow_jax.flow.standardize import Probit, Standardize
    from tarflow_jax.loading import load, load_config
    from tarflow_jax.sampling.calibration import calibrate
    from tarflow_jax.sampling.completion import complete
    from tarflow_jax.sampling.generate import sample_images
    from tarflow_jax.sampling.interpolation import interpolate
    from tarflow_jax.sampling.sample import SampleInfo, sample, sample_trajectory
    from tarflow_jax.sampling.schedule import Schedule
    from tarflow_jax.training.fit import Fitted, fit

__version__ = '0.1.0'

# Where each public name lives; a module is imported when a name of it is first used (PEP 562).
_HOMES = {
    'Condition': 'flow.condition',
    'Fitted': 'training.fit',
    'Guidance': 'flow.guidance',
    'Probit': 'flow.standardize',
    'SampleInfo': 'sampling.sample',
    'Schedule': 'sampling.schedule',
    'SequenceFlow': 'flow.flow',
    'Standardize': 'flow.standardize',
    'TarFlow': 'flow.flow',
    'animate': 'animation',
    'bits_per_dim': 'flow.likelihood',
    'calibrate': 'sampling.calibration',
    'complete': 'sampling.completion',
    'denoise': 'flow.denoising',
    'fit': 'training.fit',
    'interpolate': 'sampling.interpolation',
    'iterative_denoise': 'flow.denoising',
    'latent_log_prob': 'flow.likelihood',
    'load': 'loading',
    'load_config': 'loading',
    'load_official': 'convert',
    'log_prob': 'flow.likelihood',
    'sample': 'sampling.sample',
    'sample_images': 'sampling.generate',
    'sample_trajectory': 'sampling.sample',
    'save_official': 'convert',
}
__all__ = [
    'Condition',
    'Fitted',
    'Guidance',
    'Probit',
    'SampleInfo',
    'Schedule',
    'SequenceFlow',
    'Standardize',
    'TarFlow',
    'animate',
    'bits_per_dim',
    'calibrate',
    'complete',
    'denoise',
    'fit',
    'interpolate',
    'iterative_denoise',
    'latent_log_prob',
    'load',
    'load_config',
    'load_official',
    'log_prob',
    'sample',
    'sample_images',
    'sample_trajectory',
    'save_official',
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = getattr(importlib.import_module(f'{__name__}.{_HOMES[name]}'), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
