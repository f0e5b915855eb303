"""The flags of the command line of `prepare`."""

import argparse

from PIL import ImageColor

from tarflow_jax.data import sizes
from tarflow_jax.data.cores import available_cores
from tarflow_jax.data.cropping import RULES


def parser(description: str) -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(
        prog='python -m tarflow_jax.data.prepare', description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    flags.add_argument('source', metavar='SOURCE', help='folder, archive or file')
    flags.add_argument('--out', required=True, metavar='DIR', help='where to write')
    flags.add_argument(
        '--size', type=_size,
        help="64, or HEIGHTxWIDTH such as 48x32; default: the source's own, 64 for photographs",
    )
    flags.add_argument(
        '--crop', default='torchvision', choices=RULES,
        help='the rule for resizing and cropping photographs',
    )
    flags.add_argument(
        '--rotate', action='store_true', help='apply the EXIF orientation of images'
    )
    flags.add_argument(
        '--background', type=_colour, metavar='COLOUR',
        help='white, black or R,G,B for transparent pixels; default: the colours in the file',
    )
    flags.add_argument('--split', help='the split of SOURCE, or the one to take from it')
    flags.add_argument(
        '--test_fraction', type=float, metavar='PART',
        help='the fraction of a source without splits to split off as test, such as 0.1',
    )
    flags.add_argument(
        '--labels', metavar='FILE', help="classes of ImageNet's validation images, see above"
    )
    flags.add_argument('--name', help='name of the dataset; default: the name of SOURCE')
    flags.add_argument(
        '--features', metavar='FILE', help='.csv or .npy with numbers for each image, see above'
    )
    flags.add_argument(
        '--strict', action='store_true', help='an image that cannot be used is an error'
    )
    flags.add_argument(
        '--workers', type=_positive, default=available_cores(), help='processes'
    )
    return flags


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f'{text!r} is not a whole number above 0')
    return int(text)


def _colour(text: str) -> tuple[int, int, int]:
    try:
        numbers = text.split(',')
        if len(numbers) == 3 and all(n.strip().isdecimal() and int(n) < 256 for n in numbers):
            return tuple(map(int, numbers))
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a colour; use white, black, #RRGGBB or R,G,B such as 255,255,255'
        ) from None


def _size(text: str) -> tuple[int, int]:
    try:
        return sizes.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
