"""Makes pieces of HTML: pictures, films, tables and notes. Text is escaped on entry."""

import base64
import html
import io
import json
import math

import numpy as np
from PIL import Image

from tarflow_jax.training import pictures

# Larger pictures are shrunk: a page with full ones would not open on a phone.
LARGEST_SIDE = 64
# Larger sheets are JPEG where that is smaller: noise hardly compresses as PNG.
LARGEST_PNG = 24_000  # bytes
TRIED_AS_PNG = 400_000  # numbers; compressing more takes seconds
JPEG_QUALITIES = (88, 75, 60, 40, 20, 10)  # the first that makes it small enough
LARGEST_JPEG = 600_000  # bytes; three films of this size keep the page below 10 MB
GAP = 2  # white pixels between pictures


def strip(images, alt: str, columns: int | None = None) -> str:
    """Puts pictures in a row, or in rows of `columns`, as one <img>.

    Args:
      images: [N, H, W, C] in [-1, 1], or uint8 pixels; NaN becomes grey.
      alt: the text for readers who do not see the pictures.
    """
    columns = columns or len(images)
    pixels = sheet(images, columns)
    return picture(encoded(pixels), alt, *pixels.shape[1::-1], columns)


def sheet(images, columns: int) -> np.ndarray:
    """Puts pictures [N, H, W, C], as for `strip`, on one grid: uint8 [h, w, C]."""
    images = np.asarray(images)
    pixels = images if images.dtype == np.uint8 else pictures.to_pixels(images)
    return pictures.grid(np.stack([shrunk(picture) for picture in pixels]), columns)


def film(frames, labels: list[str], alt: str, *, columns: int, name: str, start: int = -1) -> str:
    """Makes a film that the reader plays or steps through; without JavaScript one frame shows.

    Args:
      frames: F grids of pictures; each [N, H, W, C] as for `strip`, all of one shape.
      labels: what each frame shows.
      columns: of each grid.
      name: what a screen reader calls the slider.
      start: the frame that shows at first.
    """
    sheets = [sheet(frame, columns) for frame in frames]
    (height, width), count = sheets[0].shape[:2], len(sheets)
    # White below each frame: no line of the next one shows where the browser rounds.
    tall = np.concatenate([
        np.pad(one, ((0, GAP), (0, 0), (0, 0)), constant_values=255) for one in sheets
    ])
    start = start % count
    quoted = html.escape(json.dumps(labels))
    return (
        f'<div class="film" data-labels="{quoted}" style="max-width:{columns * 100}px">'
        f'<div class="stage" style="aspect-ratio:{width}/{height}">'
        f'<img src="{encoded(tall)}" alt="{html.escape(alt)}" width="{width}" '
        f'height="{tall.shape[0]}" style="transform:translateY(-{100 * start / count:.4f}%)"></div>'
        '<div class="controls scripted"><button type="button">Play</button>'
        f'<input type="range" min="0" max="{count - 1}" value="{start}" '
        f'aria-label="{html.escape(name)}"></div>'
        f'<p class="label" aria-live="off">{html.escape(labels[start])}</p></div>'
    )


def picture(uri: str, alt: str, width: int, height: int, columns: int) -> str:
    """Makes an <img> of a data URI that holds `columns` pictures side by side."""
    # Small pictures may grow, but not so far that only their pixels show.
    return (
        f'<img src="{uri}" alt="{html.escape(alt)}" width="{width}" height="{height}" '
        f'style="max-width:{columns * 100}px">'
    )


def figure(caption: str, *content: str, lead: str = '') -> str:
    """Makes a <figure>; the caption is text, the content HTML, and `lead` stands out in bold."""
    lead = f'<strong>{html.escape(lead)}</strong> ' if lead else ''
    caption = f'<figcaption>{lead}{html.escape(caption)}</figcaption>'
    return f'<figure>{caption}{"".join(content)}</figure>'


def pictures_of(name: str, images, alt: str, caption: str = '', columns: int | None = None) -> str:
    """Makes a <figure> of pictures, see `strip`, under a name in bold."""
    return figure(caption, strip(images, alt, columns), lead=name)


def grid(figures: list[str], kind: str = '') -> str:
    """Puts figures side by side; `kind`, 'small' or 'tiny', says how wide each is."""
    return f'<div class="{f"grid {kind}".strip()}">{"".join(figures)}</div>'


def beside(left: str, right: str) -> str:
    """Puts two pieces of HTML side by side, or one below the other where there is no room."""
    return f'<div class="beside"><div>{left}</div><div>{right}</div></div>'


def paragraph(text: str, kind: str = '') -> str:
    kind = f' class="{kind}"' if kind else ''
    return f'<p{kind}>{html.escape(text)}</p>'


def heading(text: str) -> str:
    return f'<h3>{html.escape(text)}</h3>'


def missing(what: str, command: str = '') -> str:
    """Says what is missing, and the command that makes it."""
    # Word by word: a line may otherwise break between the dashes of a flag.
    code = ' '.join(f'<code>{html.escape(word)}</code>' for word in command.split())
    return f'<p class="missing">{html.escape(what)} {code}</p>'


def facts(items: dict[str, str]) -> str:
    """Makes a list of names and what they are."""
    found = ''.join(f'<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>' for k, v in items.items())
    return f'<dl>{found}</dl>'


def table(head: list[str], rows: list, caption: str) -> str:
    """Makes a table whose first column holds the row headings; numbers align right."""
    lines = []
    for first, *rest in rows:
        tail = ''.join(
            f'<td{"" if isinstance(x, str) else " class=number"}>{html.escape(number(x))}</td>'
            for x in rest
        )
        lines.append(f'<tr><th scope="row">{html.escape(number(first))}</th>{tail}</tr>')
    cells = ''.join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    top = f'<thead><tr>{cells}</tr></thead>' if any(head) else ''
    return figure(caption, wide(f'<table>{top}<tbody>{"".join(lines)}</tbody></table>', caption))


def wide(content: str, label: str) -> str:
    """Lets content scroll sideways on a phone; the keyboard reaches it, too."""
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{html.escape(label)}">{content}'
        '</div>'
    )


def number(value) -> str:
    """Text as it is, numbers to four digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return f'{value:,}'
    return f'{value:.4g}' if math.isfinite(value) else 'not finite'


def shrunk(pixels: np.ndarray) -> np.ndarray:
    """Shrinks a picture [H, W, C] to at most LARGEST_SIDE pixels a side."""
    side = max(pixels.shape[:2])
    if side <= LARGEST_SIDE:
        return pixels
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    height, width = (max(1, round(s * LARGEST_SIDE / side)) for s in pixels.shape[:2])
    image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image).reshape(height, width, -1)


def encoded(pixels: np.ndarray) -> str:
    """Returns uint8 [H, W, 1 or 3] as a data URI: PNG, or JPEG where PNG would be large."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    files = {}
    if pixels.size <= TRIED_AS_PNG:
        files['png'] = _file(image, format='PNG')
    if not files or len(files['png']) > LARGEST_PNG:
        for quality in JPEG_QUALITIES:
            # Full colour resolution at the best quality only.
            options = dict(quality=quality, subsampling=0 if quality == JPEG_QUALITIES[0] else 2)
            files['jpeg'] = _file(image, format='JPEG', **options)
            if len(files['jpeg']) <= LARGEST_JPEG:
                break
    kind = min(files, key=lambda name: len(files[name]))
    return f'data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}'


def _file(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, **options)
    return file.getvalue()
