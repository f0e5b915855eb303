"""Samples as pictures: noise, raw, denoised and guided grids, as PNG files and arrays."""

import functools
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from tarflow_jax.config import Plan
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.flow.likelihood import denoise
from tarflow_jax.flow.model import TarFlow, unpatchify
from tarflow_jax.flow.sampling import sample
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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = picture.repeat(scale, 0).repeat(scale, 1)
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    temporary = path.with_suffix('.tmp')
    image.save(temporary, format='PNG')
    temporary.replace(path)


def class_labels(model: TarFlow, count: int, label: int = -1) -> np.ndarray | None:
    """Labels int32 [count]: all `label`, or (-1) the classes in turn; None without classes."""
    if model.num_classes == 0:
        return None
    if label >= 0:
        return np.full(count, label, np.int32)
    return np.arange(count, dtype=np.int32) % model.num_classes


def draw(
    model: TarFlow,
    variables,
    key: jax.Array,
    labels,
    count: int,
    *,
    mesh,
    guidance: Guidance | None = None,
    noise_std: float = 0.0,
    denoise_strength: float = 1.0,
) -> dict[str, np.ndarray]:
    """`count` images, drawn by all devices of the mesh and brought to every process.

    Args:
      labels: int32 [count] or None.
      noise_std: of the Gaussian noise the flow was trained with; 0 leaves denoising out.
    Returns:
      'noise', 'raw' and, if asked for, 'denoised', each [count, H, W, C], and 'redraws' [count].
    """
    multiple = sharding.batch_multiple(mesh)
    padded = -(-count // multiple) * multiple
    split = sharding.batch_sharding(mesh)
    noise = _noise(key, (padded, model.num_patches, model.patch_dim), split)
    if labels is not None:
        labels = np.resize(labels, padded)
        labels = jax.make_array_from_callback((padded,), split, labels.__getitem__)
    raw, info = sample(
        model, variables, noise, labels, guidance=guidance, key=jax.random.fold_in(key, 1),
        return_info=True,
    )
    images = {'noise': unpatchify(noise, model.patch_size, model.image_size), 'raw': raw}
    if noise_std and denoise_strength:
        images['denoised'] = denoise(
            model, variables, raw, labels, noise_std=noise_std, strength=denoise_strength
        )
    images['redraws'] = info.redraws
    return {name: sharding.to_host(value)[:count] for name, value in images.items()}


@functools.partial(jax.jit, static_argnums=(1, 2))
def _noise(key, shape: tuple[int, ...], where) -> jax.Array:
    return jax.lax.with_sharding_constraint(jax.random.normal(key, shape), where)


def sheets(
    plan: Plan, variables, key, labels, count: int, mesh, denoise_strength: float, columns: int = 10
) -> tuple[dict[str, np.ndarray], int]:
    """The grids that show where a flow stands, and how many samples had to be drawn again.

    'noise', 'raw', 'denoised' (of flows trained with Gaussian noise) and 'guided' (where the
    guidance has a weight; denoised if 'denoised' is there), all from the same noise.
    """
    drawing = functools.partial(
        draw,
        plan.model,
        variables,
        key,
        labels,
        count,
        mesh=mesh,
        noise_std=plan.gaussian_noise_std,
        denoise_strength=denoise_strength,
    )
    images = drawing()
    redraws = int(images.pop('redraws').sum())
    if plan.guidance.weight > 0:
        guided = drawing(guidance=plan.guidance)
        images['guided'] = guided.get('denoised', guided['raw'])
        redraws += int(guided['redraws'].sum())
    return {name: grid(to_pixels(x), columns) for name, x in images.items()}, redraws
