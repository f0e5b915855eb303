"""Pieces of HTML: pictures as data URIs, tables and notes. Text is escaped where it enters."""

import base64
import html
import io
import math

import numpy as np
from PIL import Image

from tarflow_jax.training import pictures

# Larger pictures are shrunk: a page of full ones would not open on a phone.
LARGEST_SIDE = 64


def strip(images, alt: str, columns: int | None = None) -> str:
    """Pictures in a row, or in rows of `columns`, as one <img>.

    Args:
      images: [N, H, W, C] in [-1, 1], or uint8 pixels; grey where there is no number.
      alt: what stands for it where it cannot be seen.
    """
    images = np.asarray(images)
    pixels = images if images.dtype == np.uint8 else pictures.to_pixels(images)
    columns = columns or len(pixels)
    sheet = pictures.grid(np.stack([_shrunk(picture) for picture in pixels]), columns)
    height, width = sheet.shape[:2]
    # Small pictures may grow, but not beyond what shows more than their pixels.
    return (
        f'<img src="data:image/png;base64,{_png(sheet)}" alt="{html.escape(alt)}" '
        f'width="{width}" height="{height}" style="max-width:{columns * 100}px">'
    )


def own_scale(images) -> np.ndarray:
    """Numbers of any size [N, H, W, C] as pictures in [-1, 1], by all but their largest 1%."""
    finite = np.abs(images[np.isfinite(images)])
    return images / max(np.quantile(finite, 0.99), 1e-12) if finite.size else images


def figure(caption: str, *content: str, lead: str = '') -> str:
    """A <figure>; the caption is text, the content HTML."""
    lead = f'<strong>{html.escape(lead)}</strong> ' if lead else ''
    caption = f'<figcaption>{lead}{html.escape(caption)}</figcaption>'
    return f'<figure>{caption}{"".join(content)}</figure>'


def pictures_of(name: str, images, alt: str, caption: str = '', columns: int | None = None) -> str:
    """A <figure> of pictures, see `strip`, under a name in bold."""
    return figure(caption, strip(images, alt, columns), lead=name)


def grid(figures: list[str], kind: str = '') -> str:
    """Figures side by side; `kind`, 'small' or 'tiny', is how wide each is."""
    return f'<div class="{f"grid {kind}".strip()}">{"".join(figures)}</div>'


def paragraph(text: str, kind: str = '') -> str:
    kind = f' class="{kind}"' if kind else ''
    return f'<p{kind}>{html.escape(text)}</p>'


def missing(what: str, command: str) -> str:
    """What is not there, and the command that gives it."""
    # A word each, as a line may otherwise end between the dashes of a flag.
    code = ' '.join(f'<code>{html.escape(word)}</code>' for word in command.split())
    return f'<p class="missing">{html.escape(what)} {code}</p>'


def table(head: list[str], rows: list, caption: str) -> str:
    """Rows whose first cell is their heading; numbers are aligned to the right."""
    lines = []
    for first, *rest in rows:
        tail = ''.join(
            f'<td{"" if isinstance(x, str) else " class=number"}>{html.escape(number(x))}</td>'
            for x in rest
        )
        lines.append(f'<tr><th scope="row">{html.escape(number(first))}</th>{tail}</tr>')
    cells = ''.join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    top = f'<thead><tr>{cells}</tr></thead>' if any(head) else ''
    # What scrolls sideways on a phone must be reachable by the keyboard, too.
    return figure(
        caption, f'<div class="wide" tabindex="0" role="group" aria-label="{html.escape(caption)}">'
        f'<table>{top}<tbody>{"".join(lines)}</tbody></table></div>',
    )


def number(value) -> str:
    """Text as it is, numbers to four digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return f'{value:,}'
    return f'{value:.4g}' if math.isfinite(value) else 'not finite'


def _shrunk(picture: np.ndarray) -> np.ndarray:
    side = max(picture.shape[:2])
    if side <= LARGEST_SIDE:
        return picture
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    height, width = (max(1, round(s * LARGEST_SIDE / side)) for s in picture.shape[:2])
    image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image).reshape(height, width, -1)


def _png(sheet: np.ndarray) -> str:
    file = io.BytesIO()
    image = Image.fromarray(sheet[..., 0] if sheet.shape[-1] == 1 else sheet)
    image.save(file, format='PNG', optimize=True)
    return base64.b64encode(file.getvalue()).decode()
