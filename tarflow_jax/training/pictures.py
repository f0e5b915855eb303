"""Draws samples and arranges them in image grids: noise, raw, denoised and guided."""

from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tarflow_jax import files
from tarflow_jax.config import Plan
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.sampling.generate import generate
from tarflow_jax.sampling.noise import standard_noise
from tarflow_jax.training import sharding

CAPTION = 14  # height of a line of text, in pixels


def to_pixels(images: np.ndarray) -> np.ndarray:
    """Maps images in [-1, 1] to uint8; clips other values, and NaN pixels become grey."""
    known = np.where(np.isnan(images), 0, images)
    return np.round((np.clip(known, -1, 1) + 1) * 127.5).astype(np.uint8)


def grid(
    pixels: np.ndarray, columns: int, *, scale: int = 1, captions: Sequence[str] | None = None
) -> np.ndarray:
    """Arranges pictures [N, H, W, C] row by row, with white between: uint8 [h, w, C].

    Args:
      scale: enlarges every pixel to this many.
      captions: one for each picture, shown above it; above the column if all rows have the same.
    """
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    count, height, width, channels = pixels.shape
    rows, gap = -(-count // columns), 2 * scale
    heads = [0] * rows
    if captions is not None:
        alike = all(captions[i] == captions[i % columns] for i in range(count))
        heads = [CAPTION] + [0 if alike else CAPTION] * (rows - 1)
    shape = sum(heads) + rows * (height + gap) - gap, columns * (width + gap) - gap, channels
    sheet = np.full(shape, 255, np.uint8)
    top = 0
    for row, head in enumerate(heads):
        for i in range(row * columns, min((row + 1) * columns, count)):
            x = (i % columns) * (width + gap)
            if head:
                sheet[top : top + head, x : x + width] = _words(captions[i], head, width)
            sheet[top + head : top + head + height, x : x + width] = pixels[i]
        top += head + height + gap
    return sheet


def sheet(pixels: np.ndarray, columns: int, captions: Sequence[str] | None) -> np.ndarray:
    """Arranges pictures as `grid` does; shows small ones at twice their size."""
    return grid(pixels, columns, scale=sheet_scale(pixels.shape[1]), captions=captions)


def sheet_scale(height: int) -> int:
    """Returns the width in which `sheet` shows each pixel of pictures of this height."""
    return 2 if height < 128 else 1


def _words(text: str, height: int, width: int) -> np.ndarray:
    """Draws a line of text, shortened to the width: uint8 [height, width, 1]."""
    picture = Image.new('L', (width, height), 255)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(CAPTION - 3)
    whole = text
    while len(text) > 1 and draw.textlength(text, font) > width:
        whole = whole[:-1]
        text = f'{whole}.'
    draw.text((0, 0), text, 0, font)
    return np.asarray(picture)[..., None]


def save_png(path, picture: np.ndarray) -> None:
    """Writes a picture [H, W, 1 or 3]; replaces an existing file atomically."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    with files.replacing(path) as file:
        image.save(file, format='PNG')


def draw(
    plan: Plan, variables, key: jax.Array, count: int, *, mesh, guidance: Guidance | None = None
) -> dict[str, np.ndarray]:
    """Draws `count` images on all devices of the mesh, and brings them to every process.

    Args:
      plan: with the flow laid out over the mesh, and the conditions of the images.
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
    """Draws the image grids that training writes, captioned with the names of the classes if any.

    Returns:
      (grids, redraws): by name the grids 'noise', 'raw', 'denoised' (if the plan denoises) and
      'guided' (if the guidance weight is above 0; denoised if the plan denoises), all from the same
      noise; and how many samples were drawn again as they were not finite.
    """
    images = draw(plan, variables, key, count, mesh=mesh)
    redraws = int(images.pop('redraws').sum())
    if plan.guidance.weight > 0:
        guided = draw(plan, variables, key, count, mesh=mesh, guidance=plan.guidance)
        images['guided'] = guided.get('denoised', guided['raw'])
        redraws += int(guided['redraws'].sum())
    captions = plan.conditions.captions(range(count))
    return {name: sheet(to_pixels(x), columns, captions) for name, x in images.items()}, redraws
