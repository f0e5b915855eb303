"""Plans of tiny flows."""

import tarflow_jax as tfj
from tarflow_jax.config import Plan
from tarflow_jax.sampling.generate import Conditions, Denoising
from tarflow_jax.training.corruption import Recipe


def plan_of(
    model, *, noise='gaussian', noise_std=0.1, strength=1.0, levels=(0.2, 0.1), label=-1,
    features=None, **guidance,
) -> Plan:
    """A plan as `tarflow_jax.config.plan` makes it; the other fields are those of the guidance."""
    recipe = Recipe(noise=noise, noise_std=noise_std)
    denoising = None
    if strength and recipe.gaussian_noise_std:
        denoising = Denoising(noise_std, strength)
        if model.noise_conditioned:
            denoising = Denoising(levels=(noise_std, *levels))
    level = noise_std if model.noise_conditioned else None
    conditions = Conditions(model.num_classes, label, level, features)
    return Plan(model, recipe, tfj.Guidance(**guidance), denoising, conditions)
