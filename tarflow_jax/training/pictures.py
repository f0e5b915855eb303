"""Samples as pictures: noise, raw, denoised and guided grids, as PNG files and arrays."""


import jax
import numpy as np
from PIL import Image

from tarflow_jax import files
from tarflow_jax.config import Plan
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.sampling.generate import generate
from tarflow_jax.sampling.noise import standard_noise
from tarflow_jax.training import sharding


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Images in [-1, 1] to uint8, values outside cut off; grey where there is no number."""
    known = np.where(np.isnan(images), 0, images)
    return np.round((np.clip(known, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [N, H, W, C] as one, row by row, two white pixels between: uint8 [h, w, C]."""
    count, height, width, channels = pixels.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + 2) - 2, columns * (width + 2) - 2, channels), 255, np.uint8)
    for i, picture in enumerate(pixels):
        y, x = (i // columns) * (height + 2), (i % columns) * (width + 2)
        sheet[y : y + height, x : x + width] = picture
    return sheet


def save_png(path, picture: np.ndarray, scale: int = 1) -> None:
    """Writes a picture [H, W, 1 or 3], each pixel `scale` wide; a file there is replaced whole."""
    picture = picture.repeat(scale, 0).repeat(scale, 1)
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    with files.replacing(path) as file:
        image.save(file, format='PNG')


def draw(
    plan: Plan, variables, key: jax.Array, count: int, *, mesh, guidance: Guidance | None = None
) -> dict[str, np.ndarray]:
    """Draws `count` images by all devices of the mesh and brings them to every process.

    Args:
      plan: its flow is laid out over the mesh; its conditions are those of the images.
    Returns:
      'noise', 'raw' and, where the plan denoises, 'denoised', each [count, H, W, C], and 'redraws'
      [count].
    """
    padded = sharding.round_up(count, mesh)
    noise = standard_noise(plan.model, key, padded)
    condition = plan.conditions.of(np.resize(np.arange(count), padded))
    found = generate(
        plan.model, variables, noise, sharding.split(condition, mesh), guidance=guidance,
        denoising=plan.denoising, key=jax.random.fold_in(key, 1), return_info=True,
    )
    images = {'noise': plan.model.from_tokens(noise), 'raw': found.raw}
    if plan.denoising:
        images['denoised'] = found.samples
    images['redraws'] = found.info.redraws
    return {name: sharding.to_host(value)[:count] for name, value in images.items()}


def sheets(
    plan: Plan, variables, key, count: int, mesh, columns: int = 10
) -> tuple[dict[str, np.ndarray], int]:
    """The image grids that show where a flow stands, and how many samples were drawn again.

    'noise', 'raw', 'denoised' (of flows trained with Gaussian noise) and 'guided' (where the
    guidance has a weight; denoised if 'denoised' is there), all from the same noise.
    """
    images = draw(plan, variables, key, count, mesh=mesh)
    redraws = int(images.pop('redraws').sum())
    if plan.guidance.weight > 0:
        guided = draw(plan, variables, key, count, mesh=mesh, guidance=plan.guidance)
        images['guided'] = guided.get('denoised', guided['raw'])
        redraws += int(guided['redraws'].sum())
    return {name: grid(to_pixels(x), columns) for name, x in images.items()}, redraws
