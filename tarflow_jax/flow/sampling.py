"""The sampler: noise to images, block by block.

Shape suffixes: B images, T patches, D numbers in a patch.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.calibration import calibrated
from tarflow_jax.flow.guidance import Guidance, Steering
from tarflow_jax.flow.likelihood import prior_variance
from tarflow_jax.flow.model import (
    TarFlow,
    Variables,
    check_labels,
    flip_if,
    one_later,
    unpatchify,
)
from tarflow_jax.flow.parallel import Solution
from tarflow_jax.flow.schedule import TOLERANCE, Schedule, run_block, uniform

METHODS = ('sequential', 'jacobi', 'gs_jacobi', 'auto')
MAX_REDRAWS = 10


class SampleInfo(NamedTuple):
    """What happened while sampling; B images, N blocks by index.

    Args:
      redraws: int32 [B], how often an image was drawn again from other noise.
      sequential: bool [B], whether parallel decoding stopped before the image converged, so that it
        was drawn sequentially.
      iterations: int32 [N, B], network calls that an image took; T - 1 where sequential.
      residual: float32 [N, B], largest |x - (z exp(a(x)) + m(x))| of each block, in units of its
        output x: for block 0 those are images.
      round_trip: float32 [B], largest difference between the noise and what the (guided) flow
        makes of the image again; the noise has standard deviation 1.
    """

    redraws: np.ndarray
    sequential: Array | np.ndarray
    iterations: Array | np.ndarray
    residual: Array
    round_trip: Array


def sample(
    model: TarFlow,
    variables: Variables,
    noise: Array,
    labels: Array | None = None,
    *,
    guidance: Guidance | None = None,
    method: str = 'sequential',
    schedule: Schedule | None = None,
    segments: int = 8,
    tolerance: float = TOLERANCE,
    cache_dtype: Any = None,
    key: Array | None = None,
    return_info: bool = False,
) -> Any:
    """Images from noise: the inverse of the flow, with guidance.

    Args:
      noise: [B, T, D] standard normal.
      labels: int32 [B], -1 for none, or None.
      guidance: None is unguided.
      method: 'sequential', T - 1 network calls in a row per block; 'jacobi' or 'gs_jacobi', all
        blocks by parallel decoding (see `flow.parallel`), with `tolerance` for each block's
        output; 'auto', every block as `schedule` says.
      schedule: of `calibrate`; if None, 'auto' calibrates with the first call and remembers it for
        as long as the variables live.
      segments: of 'gs_jacobi'.
      tolerance: largest error to leave, in units of the [-1, 1] range of images.
      cache_dtype: of cached keys and values; jnp.bfloat16 halves them. None is the model's dtype.
      key: if given, an image that is not finite is drawn again by itself from fresh noise of this
        key, up to 10 times. Without a key, and with all blocks sequential, nothing is looked at on
        the host. Inside `jax.jit` there is no key, and 'auto' needs a schedule.
      return_info: also return a `SampleInfo`, which costs two more forward passes.
    Returns:
      images [B, H, W, C] float32, or (images, info).
    Raises:
      ValueError: if the arguments do not fit the model or each other.
    """
    guidance = _checked(model, noise, labels, guidance)
    if method not in METHODS:
        raise ValueError(f'sampling method {method!r} is none of {", ".join(METHODS)}.')
    leaves = jax.tree.leaves((variables, noise, labels))
    traced = any(isinstance(x, jax.core.Tracer) for x in leaves)
    if schedule is not None and method != 'auto':
        raise ValueError(f"a schedule is for method 'auto', not {method!r}; leave one of them out.")
    if method != 'auto':
        counts = {'sequential': 0, 'jacobi': 1, 'gs_jacobi': segments}
        schedule = uniform(model, counts[method], tolerance)
    elif schedule is not None:
        schedule.check(model, guidance)
    elif traced:
        raise ValueError(
            "method 'auto' inside jit needs schedule=calibrate(model, variables, ...)."
        )
    else:
        schedule = calibrated(model, variables, labels, noise.shape[0], guidance, tolerance)
    steering = Steering.of(guidance, model.num_patches)
    drawn = _draw(
        model, variables, noise, labels, steering, schedule, limited=not traced,
        cache_dtype=cache_dtype,
    )
    if not traced and (key is not None or any(block.segments for block in schedule.blocks)):
        drawn = _draw_again(model, variables, drawn, labels, steering, key, cache_dtype)
    images = unpatchify(drawn.sequences[-1], model.patch_size, model.image_size)
    if not return_info:
        return images
    residual, round_trip = _errors(model, variables, drawn.sequences, labels, steering)
    return images, SampleInfo(
        drawn.redraws, ~drawn.converged, drawn.iterations, residual, round_trip
    )


def sample_trajectory(
    model: TarFlow,
    variables: Variables,
    noise: Array,
    labels: Array | None = None,
    *,
    guidance: Guidance | None = None,
) -> list[Array]:
    """The way from noise to images: the noise, then the output of each block in order of sampling.

    Arguments as for `sample`. Returns len(layers_per_block) + 1 arrays [B, T, D]; `unpatchify`
    makes pictures of them.
    """
    steering = Steering.of(_checked(model, noise, labels, guidance), model.num_patches)
    return _draw(model, variables, noise, labels, steering, uniform(model, 0)).sequences


def _checked(model, noise, labels, guidance) -> Guidance | None:
    expected = (model.num_patches, model.patch_dim)
    if noise.ndim != 3 or noise.shape[1:] != expected:
        raise ValueError(f'noise has shape {noise.shape}, this flow takes [B, {expected}].')
    check_labels(model.num_classes, labels, noise.shape[0])
    if guidance is None or guidance.weight == 0:
        return None
    guidance.check(has_labels=model.conditional and labels is not None)
    return guidance


@dataclasses.dataclass
class _Drawn:
    """Samples on their way: the noise and the output of every block in order of sampling, each
    [B, T, D]; iterations [N, B]; converged and redraws [B]."""

    sequences: list[Array]
    iterations: Array | np.ndarray
    converged: Array | np.ndarray
    redraws: np.ndarray


def _draw(
    model, variables, noise, labels, steering, schedule, *, limited=True, cache_dtype=None
) -> _Drawn:
    x = noise * jnp.sqrt(prior_variance(variables))
    sequences: list[Array] = [noise]
    solutions: list[Solution] = []
    for b in reversed(range(len(model.layers_per_block))):
        solution = run_block(
            model, variables, b, schedule.blocks[b], x, labels, steering,
            limited=limited, cache_dtype=cache_dtype,
        )
        x = solution.x
        sequences.append(x)
        solutions.insert(0, solution)
    xp = np if all(not block.segments for block in schedule.blocks) else jnp
    return _Drawn(
        sequences,
        iterations=xp.stack([s.iterations for s in solutions]),
        converged=xp.stack([s.converged for s in solutions]).all(0),
        redraws=np.zeros(noise.shape[0], np.int32),
    )


def _draw_again(model, variables, drawn: _Drawn, labels, steering, key, cache_dtype) -> _Drawn:
    """Draws some images again, only those, and sequentially: first those that did not converge,
    from their noise; then those that are not finite, each from noise of its own."""
    to_host = model.layout.to_host
    labels = None if labels is None else to_host(labels)
    sequences, redraws = drawn.sequences, drawn.redraws
    converged, iterations = to_host(drawn.converged), np.array(to_host(drawn.iterations))

    def replace(failed, noise_of):
        # Padded to a power of two, so that few batch sizes are ever compiled.
        rows = np.resize(failed, 1 << (failed.size - 1).bit_length())
        again = _draw(
            model, variables, noise_of(rows), None if labels is None else labels[rows], steering,
            uniform(model, 0), cache_dtype=cache_dtype,
        )
        iterations[:, failed] = again.iterations[:, : failed.size]
        return [
            old.at[failed].set(new[: failed.size])
            for old, new in zip(sequences, again.sequences)
        ]

    failed = np.flatnonzero(~converged)
    if failed.size:
        sequences = replace(failed, lambda rows: _rows(model, sequences[0], rows))
    for attempt in range(MAX_REDRAWS if key is not None else 0):
        failed = np.flatnonzero(~to_host(jnp.isfinite(sequences[-1]).all((1, 2))))
        if not failed.size:
            break
        sequences = replace(failed, partial(_redrawn_noise, model, key, attempt))
        redraws[failed] += 1
    return _Drawn(sequences, iterations, converged, redraws)


@partial(jax.jit, static_argnums=0)
def _rows(model: TarFlow, noise, rows) -> Array:
    return model.layout.place(noise[rows], 'tokens')


@partial(jax.jit, static_argnums=0)
def _redrawn_noise(model: TarFlow, key, attempt, rows) -> Array:
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, attempt), row))(rows)
    shape = (model.num_patches, model.patch_dim)
    return model.layout.place(jax.vmap(lambda k: jax.random.normal(k, shape))(keys), 'tokens')


@partial(jax.jit, static_argnums=0)
def _errors(model: TarFlow, variables, sequences, labels, steering) -> tuple[Array, Array]:
    """`residual` and `round_trip` of a `SampleInfo`, from the way from noise to images."""
    deviation = jnp.sqrt(prior_variance(variables))
    # By index: block b makes outputs[b] of outputs[b + 1].
    outputs = [*sequences[:0:-1], sequences[0] * deviation]
    back, residual = outputs[0], []
    for b, (x, z) in enumerate(zip(outputs, outputs[1:])):
        log_scale, shift = _guided(model, variables, b, x, labels, steering)
        residual.append(abs(x - (z * jnp.exp(log_scale) + shift)).max((1, 2)))
        log_scale, shift = _guided(model, variables, b, back, labels, steering)
        back = (back - shift) * jnp.exp(-log_scale)
    return jnp.stack(residual), abs(back / deviation - sequences[0]).max((1, 2))


def _guided(model, variables, index, x_BxTxD, labels, steering) -> tuple[Array, Array]:
    """Guided log-scale and shift of block `index` at all positions at once, in raster order."""
    block, params = model.block_module(index), variables['params'][f'block_{index}']
    labels, temperature = steering.branch(labels, x_BxTxD.shape[0])
    reverse = index % 2 == 1
    x = jnp.repeat(flip_if(reverse, x_BxTxD, 1), steering.branches, axis=0)
    predicted: Any = block.apply(
        {'params': params}, x, labels, reverse, temperature, method='predictions'
    )
    log_scale_DxBxT, shift_DxBxT = steering.guide(*(a.transpose(2, 0, 1) for a in predicted), 0)
    log_scale, shift = (a.transpose(1, 2, 0) for a in (log_scale_DxBxT, shift_DxBxT))
    return flip_if(reverse, one_later(log_scale), 1), flip_if(reverse, one_later(shift), 1)
