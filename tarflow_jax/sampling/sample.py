"""The sampler: maps noise to sequences or images, block by block, with their density.

Shape suffixes: B examples, T tokens, D numbers in a token.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax.flow import condition as conditions
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition, check_condition, labels_keyword
from tarflow_jax.flow.flow import Flow, Variables
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.likelihood import latent_log_prob, prior_variance
from tarflow_jax.flow.mesh_axes import with_auto_axes
from tarflow_jax.flow.order import reorder, restore
from tarflow_jax.sampling.calibration import calibrated
from tarflow_jax.sampling.guided import guided_affine
from tarflow_jax.sampling.noise import noise_of_examples
from tarflow_jax.sampling.parallel import Solution
from tarflow_jax.sampling.schedule import (
    TOLERANCE,
    Schedule,
    guidance_params,
    run_block,
    uniform,
)

METHODS = ('sequential', 'jacobi', 'gs_jacobi', 'auto')
MAX_REDRAWS = 10


class SampleInfo(NamedTuple):
    """What happened while sampling; B examples, N blocks by index.

    Args:
      redraws: int32 [B], how often an example was drawn again from new noise.
      sequential: bool [B], True if parallel decoding did not converge for the example, which was
        then drawn sequentially.
      iterations: int32 [N, B], network calls that an example took.
      residual: float32 [N, B], the largest |x - (z exp(a(x)) + m(x))| of each block, in units of
        its output x. The output of block 0 is the sample.
      round_trip: float32 [B], the largest difference between the noise, of standard deviation 1,
        and the latents that the (guided) flow maps the sample back to.
    """

    redraws: np.ndarray
    sequential: Array | np.ndarray
    iterations: Array | np.ndarray
    residual: Array
    round_trip: Array


@labels_keyword
def sample(
    model: Flow,
    variables: Variables,
    noise: Array,
    condition: Condition | Array | None = None,
    *,
    guidance: Guidance | None = None,
    method: str = 'sequential',
    schedule: Schedule | None = None,
    segments: int = 8,
    tolerance: float = TOLERANCE,
    cache_dtype: Any = None,
    key: Array | None = None,
    return_log_prob: bool = False,
    return_info: bool = False,
) -> Any:
    """Draws samples: the inverse of the flow, with guidance.

    Args:
      noise: [B, T, D] standard normal.
      condition: None, labels int32 [B] (-1 for "no class"), or a `Condition`.
      guidance: None is unguided.
      method: 'sequential' decodes each block token by token, with one network call for each.
        'jacobi' and 'gs_jacobi' decode all blocks in parallel (see `sampling.parallel`), with
        `tolerance` for each block's output. 'auto' decodes every block as `schedule` says.
      schedule: from `calibrate`. Without one, 'auto' calibrates at the first call, and remembers
        the result as long as the variables exist.
      segments: of 'gs_jacobi'.
      tolerance: the largest error to accept, in units of the samples ([-1, 1] for images).
      cache_dtype: of cached keys and values; None is the model's dtype. jnp.bfloat16 halves the
        memory of a float32 cache.
      key: draws a sample that is not finite again from new noise, up to 10 times. None leaves it;
        if, besides, all blocks are sequential, the host never waits for the device. Inside
        `jax.jit`, pass no key, and a schedule to 'auto'.
      return_log_prob: also return the log density of each sample, [B] in nats, under the flow that
        drew it, which is the guided one if there is guidance. It costs nothing extra.
      return_info: also return a `SampleInfo`; it costs two more forward passes.
    Returns:
      samples float32, [B, T, D] of a `SequenceFlow` or images [B, H, W, C] of a `TarFlow`; with
      return_log_prob or return_info, a tuple (samples, [log_prob], [info]).
    Raises:
      ValueError: if the arguments do not fit the model or each other.
    """
    guidance, condition = _checked(model, noise, condition, guidance)
    if method not in METHODS:
        raise ValueError(f'sampling method {method!r} is none of {", ".join(METHODS)}.')
    leaves = jax.tree.leaves((variables, noise, condition))
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
        schedule = calibrated(model, variables, condition, noise.shape[0], guidance, tolerance)
    drawn = _draw(
        model, variables, noise, condition, guidance, schedule, limited=not traced,
        cache_dtype=cache_dtype,
    )
    if not traced and (key is not None or any(block.segments for block in schedule.blocks)):
        drawn = _draw_again(model, variables, drawn, condition, guidance, key, cache_dtype)
    found: list[Any] = [with_auto_axes(model.from_tokens, drawn.sequences[-1])]
    if return_log_prob:
        found.append(_log_prob(variables, drawn.sequences[0], drawn.logdet))
    if return_info:
        residual, round_trip = with_auto_axes(
            partial(_errors, model), noise, variables, drawn.sequences, condition,
            [guidance_params(model, b, guidance) for b in range(len(model.layers_per_block))],
        )
        found.append(SampleInfo(
            drawn.redraws, ~drawn.converged, drawn.iterations, residual, round_trip
        ))
    return tuple(found) if len(found) > 1 else found[0]


@labels_keyword
def sample_trajectory(
    model: Flow,
    variables: Variables,
    noise: Array,
    condition: Condition | Array | None = None,
    *,
    guidance: Guidance | None = None,
) -> list[Array]:
    """Draws samples and returns every stage: the noise, then the output of each block.

    Args:
      noise, condition, guidance: as for `sample`.
    Returns:
      len(layers_per_block) + 1 arrays [B, T, D], in the order of sampling; `model.from_tokens`
      makes images of them.
    """
    guidance, condition = _checked(model, noise, condition, guidance)
    return _draw(model, variables, noise, condition, guidance, uniform(model, 0)).sequences


def _checked(model, noise, condition, guidance) -> tuple[Guidance | None, Condition]:
    if noise.ndim != 3 or noise.shape[1:] != model.token_shape:
        T, D = model.token_shape
        raise ValueError(f'noise has shape {noise.shape}; this flow takes [B, {T}, {D}].')
    condition = check_condition(model, condition, noise.shape[0])
    if guidance is None or guidance.weight == 0:
        return None, condition
    guidance.check(model, condition)
    return guidance, condition


@dataclasses.dataclass
class _Drawn:
    """Samples, and how they were drawn.

    Args:
      sequences: the noise, then the output of every block in the order of sampling, [B, T, D] each.
      logdet: [B], of the inverse, in nats.
      iterations: [N, B].
      converged, redraws: [B].
    """

    sequences: list[Array]
    logdet: Array
    iterations: Array | np.ndarray
    converged: Array | np.ndarray
    redraws: np.ndarray


def _draw(
    model, variables, noise, condition, guidance, schedule, *, limited=True, cache_dtype=None
) -> _Drawn:
    x = noise * jnp.sqrt(prior_variance(variables))
    sequences: list[Array] = [noise]
    solutions: list[Solution] = []
    for b in reversed(range(len(model.layers_per_block))):
        solution = run_block(
            model, variables, b, schedule.blocks[b], x, condition, guidance,
            limited=limited, cache_dtype=cache_dtype,
        )
        x = solution.x
        sequences.append(x)
        solutions.insert(0, solution)
    xp = np if all(not block.segments for block in schedule.blocks) else jnp
    return _Drawn(
        sequences,
        logdet=jnp.stack([s.logdet for s in solutions]).sum(0),
        iterations=xp.stack([s.iterations for s in solutions]),
        converged=xp.stack([s.converged for s in solutions]).all(0),
        redraws=np.zeros(noise.shape[0], np.int32),
    )


def _draw_again(model, variables, drawn: _Drawn, condition, guidance, key, cache_dtype) -> _Drawn:
    """Draws failed samples again, sequentially, and leaves the others.

    Samples that did not converge are drawn from the same noise. Then, if there is a key, samples
    that are not finite are drawn from new noise.
    """
    to_host = model.layout.to_host
    condition = jax.tree.map(to_host, condition)
    sequences, logdet, redraws = drawn.sequences, drawn.logdet, drawn.redraws
    converged, iterations = to_host(drawn.converged), np.array(to_host(drawn.iterations))

    def replace(failed, noise_of):
        # Padded to a power of two: few batch sizes are compiled.
        rows = np.resize(failed, 1 << (failed.size - 1).bit_length())
        again = _draw(
            model, variables, noise_of(rows), conditions.rows(condition, rows), guidance,
            uniform(model, 0), cache_dtype=cache_dtype,
        )
        iterations[:, failed] = again.iterations[:, : failed.size]
        return [
            old.at[failed].set(new[: failed.size])
            for old, new in zip([*sequences, logdet], [*again.sequences, again.logdet])
        ]

    failed = np.flatnonzero(~converged)
    if failed.size:
        *sequences, logdet = replace(failed, lambda rows: _rows(model, sequences[0], rows))
    for attempt in range(MAX_REDRAWS if key is not None else 0):
        failed = np.flatnonzero(~to_host(jnp.isfinite(sequences[-1]).all((1, 2))))
        if not failed.size:
            break

        def fresh(rows, attempt=attempt):
            return noise_of_examples(model, key, rows, attempt)

        *sequences, logdet = replace(failed, fresh)
        redraws[failed] += 1
    return _Drawn(sequences, logdet, iterations, converged, redraws)


@partial(jax.jit, static_argnums=0)
def _rows(model: Flow, noise, rows) -> Array:
    return model.layout.constrain(noise[rows], 'batch', 'length', 'token')


@jax.jit
def _log_prob(variables, noise, logdet) -> Array:
    variance = prior_variance(variables)
    return latent_log_prob(noise * jnp.sqrt(variance), -logdet, variance)


@partial(jax.jit, static_argnums=0)
def _errors(model: Flow, _, variables, sequences, condition, guidance) -> tuple[Array, Array]:
    """Computes `residual` and `round_trip` of a `SampleInfo` from all stages of the samples."""
    deviation = jnp.sqrt(prior_variance(variables))
    # By index: the inverse of block b maps outputs[b + 1] to outputs[b].
    outputs = [*sequences[:0:-1], sequences[0] * deviation]
    back, residual = outputs[0], []
    for b, (x, z) in enumerate(zip(outputs, outputs[1:])):
        order = model.block_orders()[b]
        x, z, back = (reorder(a, order) for a in (x, z, back))
        predict = partial(
            guided_affine, model, variables, b, condition=condition, guidance=guidance[b]
        )
        residual.append(abs(x - predict(x).inverse(z)).max((1, 2)))
        back = restore(predict(back).forward(back), order)
    return jnp.stack(residual), abs(back / deviation - sequences[0]).max((1, 2))
