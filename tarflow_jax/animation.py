"""Animated GIFs of the way from noise to images: through the blocks, then through denoising."""

import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from tarflow_jax import files
from tarflow_jax.flow.attention import Array
from tarflow_jax.flow.condition import Condition, at_noise_level, labels_keyword
from tarflow_jax.flow.flow import TarFlow, Variables
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.sampling.generate import Denoising, denoised, denoising_of
from tarflow_jax.sampling.sample import sample_trajectory
from tarflow_jax.training.pictures import sheet, to_pixels

BLEND = 4  # frames from each stage to the next, to which it fades
FRAME, FIRST, LAST = 80, 400, 2000  # how long a frame stays, in milliseconds
MOST_LEVELS = 10  # of iterative denoising that are shown
GREYS = 32  # of a GIF without colours; noise of 256 would make the file twice as large


@labels_keyword
def animate(
    path: str | os.PathLike[str],
    model: TarFlow,
    variables: Variables,
    noise: Array,
    condition: Condition | Array | None = None,
    *,
    guidance: Guidance | None = None,
    denoise: float | Sequence[float] | Denoising | None = None,
    columns: int = 10,
) -> None:
    """Writes an animated GIF of images being drawn: noise, every block's output, denoising.

    Args:
      path: of the GIF; a file there is replaced.
      noise, condition, guidance: as for `sample`.
      denoise: as for `sample_images`; None shows no denoising.
      columns: of the image grid.
    Raises:
      ValueError: if the arguments do not fit the flow or each other.
    """
    stages = trajectory(
        model, variables, noise, condition, guidance=guidance, denoise=denoise
    )
    save_gif(path, stages, columns)


def trajectory(
    model: TarFlow, variables: Variables, noise: Array, condition=None, *,
    guidance: Guidance | None = None,
    denoise: float | Sequence[float] | Denoising | None = None,
) -> list[np.ndarray]:
    """The stages of drawing images, each [B, H, W, C]; arguments as for `animate`."""
    denoising = None if denoise is None else denoising_of(model, denoise)
    if denoising is not None and denoising.levels:
        condition = at_noise_level(condition, denoising.levels[0])
    sequences = sample_trajectory(model, variables, noise, condition, guidance=guidance)
    stages: list[Any] = [model.from_tokens(x) for x in sequences]
    if denoising is not None:
        clean = denoised(
            model, variables, stages[-1], condition, denoising, return_path=True
        )
        if denoising.levels:
            shown = np.linspace(0, len(clean) - 1, min(len(clean), MOST_LEVELS + 1)).astype(int)
            stages += [clean[i] for i in shown[1:]]
        else:
            stages.append(clean)
    return [np.asarray(jax.device_get(stage)) for stage in stages]


def save_gif(path, stages: Sequence[np.ndarray], columns: int = 10) -> None:
    """Writes an animated GIF of image grids, fading from each stage [B, H, W, C] to the next."""
    frames, durations = [stages[0]], [FIRST]
    for before, after in zip(stages, stages[1:]):
        for i in range(1, BLEND + 1):
            frames.append(before + (i / BLEND) * (after - before))
            durations.append(FRAME)
    durations[-1] = LAST
    pictures = []
    for frame in frames:
        grid = sheet(to_pixels(frame), min(columns, len(frame)), None)
        if grid.shape[-1] == 1:
            levels = np.round(grid[..., 0] * ((GREYS - 1) / 255))
            grid = np.uint8(np.round(levels * (255 / (GREYS - 1))))
        pictures.append(Image.fromarray(grid))
    with files.replacing(path) as file:
        pictures[0].save(
            file, format='GIF', save_all=True, append_images=pictures[1:], duration=durations,
            loop=0, optimize=True,
        )
