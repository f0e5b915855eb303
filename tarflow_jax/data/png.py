"""Encodes and decodes PNG in memory with Pillow."""

import io

import numpy as np
from PIL import Image

SIGNATURE = b'\x89PNG\r\n\x1a\n'


def write_png(image_HxWxC: np.ndarray) -> bytes:
    """Encodes a uint8 image with 1 or 3 channels as a PNG file."""
    grey = image_HxWxC.shape[2] == 1
    data = io.BytesIO()
    Image.fromarray(image_HxWxC[..., 0] if grey else image_HxWxC).save(data, 'PNG')
    return data.getvalue()


def read_png(data: bytes) -> np.ndarray:
    """Decodes a PNG file to a uint8 image [H,W,C].

    Raises:
        OSError: the file is damaged.
    """
    with Image.open(io.BytesIO(data), formats=['PNG']) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels
