"""Image sizes: one number for a square, else height and width."""

from collections.abc import Sequence


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width)."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def plain(size: tuple[int, int]) -> int | list[int]:
    """Returns the size as a JSON value: a number for a square, else [height, width]."""
    height, width = size
    return height if height == width else [height, width]


def text(size: tuple[int, int]) -> str:
    """Returns the size in the form of the command line, such as '64' or '48x32'."""
    height, width = size
    return str(height) if height == width else f'{height}x{width}'


def parse(given: str) -> tuple[int, int]:
    """Reads a size such as '64' or '48x32', HEIGHTxWIDTH.

    Raises:
        ValueError: it is neither.
    """
    numbers = given.split('x')
    if len(numbers) > 2 or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise ValueError(
            f'{given!r} is not a whole number above 0, nor HEIGHTxWIDTH such as 48x32'
        )
    return int(numbers[0]), int(numbers[-1])
