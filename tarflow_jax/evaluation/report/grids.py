"""Reads the image grids that training wrote, to show them one step after another."""

import logging
import re

import numpy as np
from PIL import Image

from tarflow_jax.evaluation.report import markup
from tarflow_jax.training import pictures

KINDS = ('guided', 'denoised', 'raw')  # the first that there is shows
COLUMNS = 10  # of the grids in WORKDIR/samples
MOST_STEPS = 16
MOST_ROWS = 4

log = logging.getLogger(__name__)


def read(workdir, image_shape, names: list[str] | None = None) -> dict:
    """Reads the image grids of at most MOST_STEPS evenly spaced steps, with the first and last.

    Args:
      workdir: whose `samples` folder has them; see `training.pictures.sheets`.
      image_shape: (H, W, C) of an image.
      names: what each column shows.
    Returns:
      'kind': which of KINDS; 'steps': int list; 'frames': the first rows of each grid as pictures
      uint8 [N, h, w, C], shrunk; 'columns'; and 'names'. A damaged file is left out.
    """
    folder = workdir / 'samples'
    by_kind: dict[str, dict] = {kind: {} for kind in KINDS}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r'step_(\d{7,})_(\w+)\.png', path.name)
        if match and match[2] in KINDS:
            by_kind[match[2]][int(match[1])] = path
    newest = max((step for steps in by_kind.values() for step in steps), default=None)
    kind = next((kind for kind in KINDS if newest in by_kind[kind]), KINDS[-1])
    chosen = sorted(by_kind[kind])
    if len(chosen) > MOST_STEPS:
        places = np.linspace(0, len(chosen) - 1, MOST_STEPS).round().astype(int)
        chosen = [chosen[i] for i in places]
    steps, frames = [], []
    for step in chosen:
        found = _tiles(by_kind[kind][step], image_shape)
        if found is not None and (not frames or found.shape == frames[0].shape):
            steps.append(step)
            frames.append(found)
    return {'kind': kind, 'steps': steps, 'frames': frames, 'columns': COLUMNS, 'names': names}


def _tiles(path, image_shape) -> np.ndarray | None:
    try:
        with path.open('rb') as file, Image.open(file) as image:
            pixels = np.asarray(image)
        found = tiles(pixels.reshape(*pixels.shape[:2], -1), image_shape)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        log.warning('%s is not an image grid of this run and left out: %s', path, error)
        return None
    return np.stack([markup.shrunk(one) for one in found[: MOST_ROWS * COLUMNS]])


def tiles(sheet: np.ndarray, image_shape) -> np.ndarray:
    """Cuts a grid that `pictures.sheet` made into its pictures: uint8 [N, H, W, C].

    Args:
      sheet: uint8 [h, w, C] with COLUMNS columns, with captions or without.
      image_shape: (H, W, C) of a picture.
    Raises:
      ValueError: if the sheet is no such grid.
    """
    height, width, channels = image_shape
    scale = pictures.sheet_scale(height)
    gap, caption = 2 * scale, pictures.CAPTION
    across, down = width * scale + gap, height * scale + gap
    if sheet.shape[1:] != (COLUMNS * across - gap, channels):
        raise ValueError(f'it is {sheet.shape[1]} pixels wide with {sheet.shape[2]} channels')
    total = sheet.shape[0] + gap
    for head, each in ((0, 0), (caption, 0), (0, caption)):
        rows, rest = divmod(total - head, down + each)
        if rest == 0 and rows > 0:
            break
    else:
        raise ValueError(f'it is {sheet.shape[0]} pixels high')
    found = []
    for row in range(rows):
        top = head + row * (down + each) + each
        for column in range(COLUMNS):
            left = column * across
            own = sheet[top : top + height * scale, left : left + width * scale]
            found.append(own[::scale, ::scale])
    return np.stack(found)
