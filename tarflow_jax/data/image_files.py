"""Converts image files to PNG files of one size.

This module runs in many worker processes, so it imports little and returns only bytes and text.
"""

import functools
import io
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from tarflow_jax.data import listing
from tarflow_jax.data.cropping import BadImage, resize_and_crop
from tarflow_jax.data.listing import UNREADABLE, File
from tarflow_jax.data.png import SIGNATURE, write_png

# Pillow supports more formats, but some of them start other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'AVIF', 'JPEG2000', 'BMP', 'GIF', 'TIFF', 'PPM')
# In order of preference, for samples with several files.
SUFFIXES = (
    'jpg', 'jpeg', 'png', 'webp', 'avif', 'jp2', 'bmp', 'gif', 'tif', 'tiff', 'ppm', 'pgm', 'tga',
)
MAX_FILE_BYTES = 2**30
TGA_SUFFIXES = ('.tga', '.vda', '.icb', '.vst')  # TGA has no signature, so its name must tell
# Pillow would otherwise load its formats at first use, possibly in a thread while others import.
Image.init()


ROTATED = (
    'has an EXIF rotation that was not applied, as in torchvision; use --rotate to apply it'
)
TRANSPARENT = (
    'has transparent pixels, whose hidden colours were kept; use --background=white to fill them'
)
COUNTED = (ROTATED, TRANSPARENT)  # notes that every image of a dataset may have
_GREY = ('1', 'L', 'LA', 'I', 'I;16', 'I;16B', 'I;16L')  # modes of Pillow
_ORIENTATION = 0x0112


class Form(NamedTuple):
    """The form to convert image files to.

    Args:
        size: (H, W).
        exact: whether to reject images of any other size instead of resizing them.
        crop: the rule for resizing and cropping, see `cropping`.
        rotate: whether to apply the EXIF orientation.
        background: the colour for transparent pixels; None keeps their hidden colours.
        channels: 1 or 3.
    """

    size: tuple[int, int]
    exact: bool = False
    crop: str = 'torchvision'
    rotate: bool = False
    background: tuple[int, int, int] | None = None
    channels: int = 3


class Encoded(NamedTuple):
    """A PNG file or the reason why there is none, and notes about the image."""

    png: bytes | None
    reason: str = ''
    notes: tuple[str, ...] = ()


def encode_files(files: list[File], form: Form) -> list[Encoded]:
    """Reads image files and converts them to PNG files [H,W,C].

    Raises:
        OSError: a file has become unreadable, or has changed.
    """
    return [
        _encode(functools.partial(_read, file), _formats(file.name), form)
        for file in files
    ]


def encode_contents(contents: list[bytes], form: Form) -> list[Encoded]:
    """Converts image files in memory like `encode_files`; empty bytes mean no image."""
    return [
        _encode(functools.partial(_checked, content), FORMATS, form)
        for content in contents
    ]


def encode_array(image_NxHxWxC: Iterable[np.ndarray], size: tuple[int, int],
                 crop: str = 'torchvision') -> list[Encoded]:
    """Converts uint8 images with 1 or 3 channels to PNG files, resized and cropped to (H, W)."""
    encoded = []
    for image_HxWxC in image_NxHxWxC:
        if image_HxWxC.shape[:2] != size:
            grey = image_HxWxC.shape[2] == 1
            image = Image.fromarray(image_HxWxC[..., 0] if grey else image_HxWxC)
            image_HxWxC = np.asarray(resize_and_crop(image, size, crop)).reshape(*size, -1)
        encoded.append(Encoded(write_png(image_HxWxC)))
    return encoded


def all_grey(files: Iterable[File]) -> bool:
    """Returns whether all readable image files are grey; stops at the first that is not."""
    return _all_grey((functools.partial(_read, file), _formats(file.name)) for file in files)


def all_grey_contents(contents: Iterable[bytes]) -> bool:
    """Does the same as `all_grey` for files in memory."""
    return _all_grey((functools.partial(_checked, content), FORMATS) for content in contents)


def _all_grey(images: Iterable[tuple[Callable[[], bytes], tuple[str, ...]]]) -> bool:
    found = False
    for read, formats in images:
        try:
            with Image.open(io.BytesIO(read()), formats=formats) as image:
                if image.mode not in _GREY:
                    return False
                found = True
        except Exception:  # Pillow raises nearly anything; damaged images are skipped later
            continue
    return found


def size_of(file: File, rotate: bool = False) -> tuple[int, int] | None:
    """Returns (height, width) of an image file; None if it cannot be used."""
    try:
        image, _ = _load(_read(file), _formats(file.name), Form((1, 1), rotate=rotate))
    except BadImage:
        return None
    return image.height, image.width


def size_of_content(content: bytes, rotate: bool = False) -> tuple[int, int] | None:
    """Returns (height, width) of an image file in memory; None if it cannot be used."""
    try:
        image, _ = _load(_checked(content), FORMATS, Form((1, 1), rotate=rotate))
    except BadImage:
        return None
    return image.height, image.width


def _formats(name: str) -> tuple[str, ...]:
    return (*FORMATS, 'TGA') if name.lower().endswith(TGA_SUFFIXES) else FORMATS


def _encode(read: Callable[[], bytes], formats: tuple[str, ...], form: Form) -> Encoded:
    wanted_height, wanted_width = form.size
    wanted = f'{wanted_width}x{wanted_height}'  # Pillow's order, like the other size in the message
    if wanted_height != wanted_width:
        wanted += ' (width x height)'
    try:
        image, notes = _load(read(), formats, form)
        width, height = image.size
        if form.exact and (height, width) != form.size:
            raise BadImage(f'is {width}x{height}, not {wanted}')
        if width < wanted_width or height < wanted_height:
            notes.append(f'is {width}x{height}, smaller than {wanted}, and was enlarged')
        pixels = np.asarray(resize_and_crop(image, form.size, form.crop))
        return Encoded(write_png(pixels.reshape(*form.size, -1)), notes=tuple(notes))
    except BadImage as error:
        return Encoded(None, str(error))


def _read(file: File) -> bytes:
    if file.size == UNREADABLE:
        raise BadImage('is a broken link or not a regular file')
    if file.size == 0:
        raise BadImage('is empty')
    if file.size > MAX_FILE_BYTES:
        raise BadImage(f'has {file.size} bytes, too many for an image')
    try:
        return listing.read(file)
    except PermissionError as error:
        raise BadImage(f'cannot be read: {error.strerror}') from error
    except ValueError as error:
        raise BadImage(str(error)) from error


def _checked(content: bytes) -> bytes:
    if not content:
        raise BadImage('is empty')
    return content


def _load(
    data: bytes, formats: tuple[str, ...], form: Form
) -> tuple[Image.Image, list[str]]:
    """Decodes an image with the channels of `form`, at its own size; returns it with notes."""
    notes = []
    mode = 'L' if form.channels == 1 else 'RGB'
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            image.load()
            if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
                if form.rotate:
                    image = ImageOps.exif_transpose(image)
                else:
                    notes.append(ROTATED)
            if image.has_transparency_data:
                # As in torchvision, whose conversion ignores transparency.
                transparent = image.convert('RGBA')
                if transparent.getextrema()[3][0] < 255:
                    if form.background is None:
                        notes.append(TRANSPARENT)
                    else:
                        below = Image.new('RGBA', image.size, (*form.background, 255))
                        image = Image.alpha_composite(below, transparent)
            deep = data.startswith(SIGNATURE) and data[24] == 16
            if image.mode.startswith('I;16') or (deep and image.mode == 'I'):
                # Pillow's own conversion would clip values at 255.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                deep = True
            elif image.mode in ('I', 'F'):
                raise BadImage(f'has 32-bit pixels ({image.mode}) of unknown scale')
            if deep:
                notes.append('has 16 bits per channel, of which the upper 8 were kept')
            if image.mode == 'CMYK':
                notes.append('is CMYK and was converted to RGB')
            return image.convert(mode), notes
    except BadImage:
        raise
    except Exception as error:  # Pillow raises nearly anything for damaged files
        raise BadImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return 'is not an image in any of the formats ' + ', '.join((*FORMATS, 'TGA'))
    if isinstance(error, Image.DecompressionBombError):
        return f'is a decompression bomb: {error}'
    return f'is damaged: {str(error) or type(error).__name__}'.partition('\n')[0]
