"""Image files to PNG files of one size, as torchvision's Resize and CenterCrop would cut them.

What runs here runs in many processes: it imports little and returns only bytes and words.
"""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from tarflow_jax.data.listing import UNREADABLE, File
from tarflow_jax.data.png import SIGNATURE, write_png

# Formats of photographs. Pillow knows more, some of which start other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM')
MAX_FILE_BYTES = 2**30
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # where Pillow itself speaks of a decompression bomb


class Encoded(NamedTuple):
    """A PNG file, or the reason why there is none; notes are worth knowing either way."""

    png: bytes | None
    reason: str = ''
    notes: tuple[str, ...] = ()


class BadImage(Exception):
    """Why a file makes no image."""


def encode_files(files: list[File], size: tuple[int, int], exact: bool) -> list[Encoded]:
    """Reads image files and makes PNG files [H,W,3] of them.

    Args:
        files: where they are.
        size: (H, W) of the result.
        exact: refuse images of any other size rather than resize them.

    Raises:
        OSError: a file that was there cannot be read any more, or has changed.
    """
    return [_encode_file(file, size, exact) for file in files]


def encode_array(image_NxHxWxC: np.ndarray, size: tuple[int, int]) -> list[Encoded]:
    """PNG files of uint8 images with 1 or 3 channels, resized and cropped to `size`, (H, W)."""
    encoded = []
    for image_HxWxC in image_NxHxWxC:
        if image_HxWxC.shape[:2] != size:
            grey = image_HxWxC.shape[2] == 1
            image = Image.fromarray(image_HxWxC[..., 0] if grey else image_HxWxC)
            image_HxWxC = np.asarray(resize_and_crop(image, size)).reshape(*size, -1)
        encoded.append(Encoded(write_png(image_HxWxC)))
    return encoded


def resize_and_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resizes the image until it covers `size`, (H, W), and crops the middle.

    Keeps the aspect: one side becomes that of `size`, and the other is rounded down and at least
    that of `size`. Bilinear and antialiased, in uint8. For squares this equals torchvision's
    Resize(size) and CenterCrop(size), down to half pixels of the offset, which round to even.
    """
    wanted_height, wanted_width = size
    width, height = image.size
    if wanted_width * height >= wanted_height * width:
        resized = wanted_width, wanted_width * height // width
    else:
        resized = wanted_height * width // height, wanted_height
    if resized != image.size:
        if resized[0] * resized[1] > MAX_PIXELS:
            raise BadImage(f'is {width}x{height}, too long for its other side')
        image = image.resize(resized, Image.Resampling.BILINEAR)
    left, top = (
        int(round((side - wanted) / 2))
        for side, wanted in zip(image.size, (wanted_width, wanted_height))
    )
    return image.crop((left, top, left + wanted_width, top + wanted_height))


def _encode_file(file: File, size: tuple[int, int], exact: bool) -> Encoded:
    wanted_height, wanted_width = size
    wanted = f'{wanted_width}x{wanted_height}'  # Pillow's order, as that of the image beside it
    if wanted_height != wanted_width:
        wanted += ' (width x height)'
    try:
        data = _read(file)
        image, notes = _load_rgb(data)
        width, height = image.size
        if exact and (height, width) != size:
            raise BadImage(f'is {width}x{height}, not {wanted}')
        if width < wanted_width or height < wanted_height:
            notes.append(f'is {width}x{height}, smaller than {wanted}, and was enlarged')
        pixels = np.asarray(resize_and_crop(image, size))
        return Encoded(write_png(pixels), notes=tuple(notes))
    except BadImage as error:
        return Encoded(None, str(error))


def _read(file: File) -> bytes:
    if file.size == UNREADABLE:
        raise BadImage('is a link to nothing, or no regular file')
    if file.size == 0:
        raise BadImage('is empty')
    if file.size > MAX_FILE_BYTES:
        raise BadImage(f'has {file.size} bytes, more than an image has')
    try:
        with open(file.path, 'rb') as opened:
            opened.seek(file.offset)
            data = opened.read(file.size)
    except PermissionError as error:
        raise BadImage(f'cannot be read: {error.strerror}') from error
    except FileNotFoundError as error:
        raise OSError(f'{file.path} is not there any more') from error
    if len(data) != file.size:  # changed, or on a drive that went away
        raise OSError(f'{file.path} became shorter since it was listed')
    return data


def _load_rgb(data: bytes) -> tuple[Image.Image, list[str]]:
    notes = []
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            deep = data.startswith(SIGNATURE) and data[24] == 16
            if image.mode.startswith('I;16') or (deep and image.mode == 'I'):
                # Pillow's own conversion would clip at 255.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                deep = True
            elif image.mode in ('I', 'F'):
                raise BadImage(f'has pixels of {image.mode}, 32 bits, of unknown scale')
            if deep:
                notes.append('has 16 bits per channel, of which the upper 8 were taken')
            if image.mode == 'CMYK':
                notes.append('is CMYK and was converted to RGB')
            return image.convert('RGB'), notes
    except BadImage:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise BadImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return 'is no image, or of none of the formats ' + ', '.join(FORMATS)
    if isinstance(error, Image.DecompressionBombError):
        return f'is a decompression bomb: {error}'
    return f'is damaged: {str(error) or type(error).__name__}'.partition('\n')[0]
