"""Three rules to resize and crop photographs, each as in the software it is named after."""

from PIL import Image

RULES = ('torchvision', 'edm', 'adm')
MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow's own limit for a decompression bomb


class BadImage(Exception):
    """The reason why a file cannot be used as an image."""


def resize_and_crop(image: Image.Image, size: tuple[int, int],
                    rule: str = 'torchvision') -> Image.Image:
    """Resizes and crops an image to `size`, (H, W), which must be square for 'edm' and 'adm'.

    - torchvision: resizes the image to cover `size`, keeping its aspect ratio, and crops the
      centre. The filter is bilinear and antialiased, in uint8. One side becomes that of `size`; the
      other is rounded down. For squares this equals torchvision's Resize(size) and
      CenterCrop(size), including half-pixel offsets, which round to even.
    - edm: crops the central square and resizes it with a Lanczos filter (the center-crop of
      dataset_tool.py in NVlabs/edm).
    - adm: halves the image with a box filter while its short side is at least twice `size`,
      resizes the short side with a bicubic filter, and crops the centre (center_crop_arr in
      openai/guided-diffusion).

    Raises:
        BadImage: the resized image would have too many pixels, because it is extremely long.
    """
    return {'torchvision': _torchvision, 'edm': _edm, 'adm': _adm}[rule](image, size)


def describe(size: tuple[int, int], rule: str) -> str:
    """Describes the rule in words, for the manifest."""
    height, width = size
    if rule == 'edm':
        return f'the middle square cut out, then resized to {height}x{width}, Lanczos (Pillow)'
    if rule == 'adm':
        return (
            f'halved with a box filter while the short side has {2 * height} pixels or more, short '
            f'side resized to {height} pixels, bicubic (Pillow), then the middle {height}x{width} '
            'cut out'
        )
    short = (
        f'short side resized to {height} pixels' if height == width else
        f'resized, aspect kept, until both sides cover {height}x{width} (height x width) pixels'
    )
    return f'{short}, bilinear and antialiased (Pillow), then the middle {height}x{width} cut out'


def _torchvision(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    wanted_height, wanted_width = size
    width, height = image.size
    if wanted_width * height >= wanted_height * width:
        resized = wanted_width, wanted_width * height // width
    else:
        resized = wanted_height * width // height, wanted_height
    image = _resized(image, resized, Image.Resampling.BILINEAR)
    left, top = (
        int(round((side - wanted) / 2))
        for side, wanted in zip(image.size, (wanted_width, wanted_height))
    )
    return image.crop((left, top, left + wanted_width, top + wanted_height))


def _edm(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize(size[::-1], Image.Resampling.LANCZOS)


def _adm(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    side, _ = size
    while min(image.size) >= 2 * side:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    image = _resized(image, (width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _resized(image: Image.Image, size: tuple[int, int], how: Image.Resampling) -> Image.Image:
    if size == image.size:
        return image
    if size[0] * size[1] > MAX_PIXELS:
        width, height = image.size
        raise BadImage(f'is {width}x{height}, which is too elongated')
    return image.resize(size, how)
