"""Schedules: which method inverts each block, their files, and inversion by a schedule."""

import dataclasses
import json
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from tarflow_jax import files, json_files, paths
from tarflow_jax.flow import decoder
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.flow import Flow, architecture
from tarflow_jax.flow.guidance import Guidance, GuidanceParams
from tarflow_jax.flow.mesh_axes import with_auto_axes
from tarflow_jax.sampling.parallel import Solution, solve_block

TOLERANCE = 1e-4  # of the [-1, 1] range of images
FORMAT = 1
_NUMBER, _WHOLE = (float, None), (int, None)
_FILE = {
    'format': int,
    'blocks': [{
        'segments?': int, 'tolerance?': float, 'max_iterations?': int, 'calls?': _WHOLE,
        'seconds?': _NUMBER, 'sequential_seconds?': _NUMBER,
    }],
    'tolerance?': float, 'made_for?': (dict, None), 'batch_size?': _WHOLE, 'error?': _NUMBER,
}


@dataclasses.dataclass(frozen=True)
class BlockSchedule:
    """How one block is inverted, and what `calibrate` measured for it.

    Args:
      segments: 0 is sequential, 1 is Jacobi, more is Gauss-Seidel-Jacobi.
      tolerance: of `solve_block`, in units of the block's output.
      max_iterations: an example that takes more is drawn sequentially; 0 sets no limit.
      calls: consecutive network calls.
      seconds, sequential_seconds: time of a batch by this schedule, and sequentially.

    Raises:
      ValueError: for a value outside these.
    """

    segments: int = 0
    tolerance: float = TOLERANCE
    max_iterations: int = 0
    calls: int | None = None
    seconds: float | None = None
    sequential_seconds: float | None = None

    def __post_init__(self):
        if self.segments < 0:
            raise ValueError(f'segments {self.segments} must be at least 1, or 0 for sequential.')
        if self.max_iterations < 0:
            raise ValueError(f'max_iterations {self.max_iterations} must be at least 0.')
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f'tolerance {self.tolerance} must be a number from 0 up.')

    @property
    def method(self) -> str:
        return {0: 'sequential', 1: 'jacobi'}.get(self.segments, f'gs_jacobi {self.segments}')


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a flow is inverted: `sample(..., method='auto', schedule=schedule)`.

    Args:
      blocks: by index; sampling starts with the last.
      tolerance: the one requested, in units of the [-1, 1] range of images.
      made_for: the model, device and guidance that `check` compares. None fits all.
      batch_size: of the calibration.
      error: largest difference to sequential samples in the calibration, in image units.
    """

    blocks: tuple[BlockSchedule, ...]
    tolerance: float = TOLERANCE
    made_for: dict | None = None
    batch_size: int | None = None
    error: float | None = None

    def check(self, model: Flow, guidance: Guidance | None) -> None:
        """Raises ValueError if the schedule was made for another model, device or guidance."""
        if len(self.blocks) != len(model.layers_per_block):
            raise ValueError(
                f'the schedule is for {len(self.blocks)} blocks, the flow has '
                f'{len(model.layers_per_block)}; calibrate again for this flow.'
            )
        here = made_for(model, guidance)
        for what, value in (self.made_for or {}).items():
            if value != here.get(what):
                raise ValueError(
                    f'the schedule was made for {what} {value}, this is {here.get(what)}; '
                    'calibrate again.'
                )

    def save(self, path) -> None:
        """Writes the schedule as JSON."""
        content = json_files.sealed(json.loads(json.dumps(
            {'format': FORMAT} | dataclasses.asdict(self)
        )))
        files.write_text(path, json.dumps(content, indent=2) + '\n')

    @classmethod
    def load(cls, path) -> 'Schedule':
        """Reads a schedule that `save` wrote.

        Raises:
          ValueError: if the file is damaged or holds something else.
          FileNotFoundError: if the file does not exist.
        """
        try:
            fields = json_files.read(paths.of(path), _FILE)
            if fields.pop('format') != FORMAT:
                raise ValueError('another format')
            blocks = tuple(BlockSchedule(**block) for block in fields.pop('blocks'))
            return cls(blocks, **fields)
        except (ValueError, TypeError) as error:
            raise ValueError(
                f'{path} is not a schedule of this version ({error}); remove it and calibrate '
                'again.'
            ) from error

    def table(self) -> list[str]:
        """Formats the schedule as lines of text, blocks in the order of sampling."""
        lines = [
            f'{"block":>5}  {"method":<13} {"calls in a row":>14} {"seconds":>9} '
            f'{"sequential":>10}'
        ]
        number = lambda x, digits: '-' if x is None else f'{x:.{digits}f}'  # noqa: E731
        for b in reversed(range(len(self.blocks))):
            block = self.blocks[b]
            lines.append(
                f'{b:>5}  {block.method:<13} {number(block.calls, 0):>14} '
                f'{number(block.seconds, 4):>9} {number(block.sequential_seconds, 4):>10}'
            )
        total = [sum(getattr(b, field) or 0 for b in self.blocks)
                 for field in ('calls', 'seconds', 'sequential_seconds')]
        lines.append(f'{"all":>5}  {"":<13} {total[0]:>14} {total[1]:>9.4f} {total[2]:>10.4f}')
        if self.error is not None:
            lines.append(
                f'largest difference to sequential samples {self.error:.1e} (tolerance '
                f'{self.tolerance:.0e}), of {self.batch_size} images'
            )
        return lines


def uniform(model: Flow, segments: int, tolerance: float = TOLERANCE) -> Schedule:
    """Makes a schedule, without measuring, that inverts all blocks alike.

    Args:
      segments, tolerance: of every block, see `BlockSchedule`.
    """
    block = BlockSchedule(segments, tolerance)
    return Schedule((block,) * len(model.layers_per_block), tolerance)


def made_for(model: Flow, guidance: Guidance | None) -> dict:
    """Describes what a schedule depends on besides the weights, as JSON values."""
    device = jax.devices()[0]
    return {
        'model': architecture(model) | {'dtype': jnp.dtype(model.dtype).name},
        'device': f'{jax.device_count()} x {device.device_kind}',
        'guidance': dataclasses.asdict(guidance or Guidance()),
    }


def run_block(
    model: Flow,
    variables,
    index: int,
    how: BlockSchedule,
    z_BxTxD: Array,
    condition,
    guidance: Guidance | None,
    *,
    limited: bool = True,
    cache_dtype=None,
) -> Solution:
    """Inverts block `index` as `how` says; limited=False ignores max_iterations."""
    block, params = model.block(index), variables['params'][f'block_{index}']
    params_of_guidance = guidance_params(model, index, guidance)
    # The order is traced, so that blocks of the same depth share one compiled program.
    order = model.block_orders()[index]
    given = (z_BxTxD, params, condition, order, params_of_guidance)
    if how.segments:
        limit = how.max_iterations if limited and how.max_iterations else block.length
        return with_auto_axes(
            partial(solve_block, block, how.segments, cache_dtype=cache_dtype), *given,
            jnp.float32(how.tolerance), jnp.int32(limit),
        )
    x, logdet = with_auto_axes(partial(decoder.invert, block, cache_dtype=cache_dtype), *given)
    batch = x.shape[0]
    return Solution(
        x, logdet, np.full(batch, block.calls, np.int32), np.ones(batch, bool),
        np.int32(block.calls),
    )


def guidance_params(model: Flow, index: int, guidance: Guidance | None) -> GuidanceParams:
    """Returns the guidance of block `index`."""
    place = len(model.layers_per_block) - 1 - index
    return GuidanceParams.of(guidance, model.token_shape[0], place)
