"""The recipe's optimizer: AdamW with a warm-up and cosine schedule."""

import jax.numpy as jnp
import optax


def learning_rate_schedule(
    *, peak: float, floor: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Returns the learning rate of update k = 0, 1, ...: linear warm-up, then cosine decay.

    Update 0 uses `floor`, update `warmup_steps` uses `peak`; the decay ends at `floor`.

    Raises:
      ValueError: if the warm-up leaves no step for the decay.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f'warmup_steps {warmup_steps} leave none of total_steps {total_steps} for the decay; '
            f'choose at most {total_steps - 1}.'
        )

    def schedule(k):
        k = jnp.asarray(k, jnp.float32)
        warming = k / max(warmup_steps, 1)
        left = jnp.clip((total_steps - k) / (total_steps - warmup_steps), 0, 1)
        # Equals (1 + cos(pi (1 - left))) / 2, without cancellation near the end.
        cosine = jnp.square(jnp.sin(0.5 * jnp.pi * left))
        return floor + (peak - floor) * jnp.where(k < warmup_steps, warming, cosine)

    return schedule


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Returns AdamW for all parameters, with gradients clipped to a global norm.

    Args:
      clip_norm: the largest global norm; 0 does not clip.
    Raises:
      ValueError: if clip_norm is negative.
    """
    if clip_norm < 0:
        raise ValueError(f'clip_norm {clip_norm} must not be negative; 0 does not clip.')
    # With identity the optimizer state has the same tree with and without clipping.
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    return optax.chain(
        clip, optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay)
    )
