"""Keeps what a comparison needs of a report in `report.json`, so that it computes nothing again."""

import json
import logging
import re

from tarflow_jax import files, json_files
from tarflow_jax.evaluation.report import lead, markup

FILE = 'report.json'
_SHAPE = {
    'origin': {'name': str},
    'date': str,
    'model': dict,
    'parameters': int,
    'train': {'images': int},
    'noise_std': float,
    'lowest_noise_std': float,
    'guidance': {'weight': float},
    'denoises': bool,
    'columns': int,
    'samples': [{'name': str, 'alt': str, 'picture': str, 'width': int, 'height': int}],
}

log = logging.getLogger(__name__)


def write(workdir, found: dict) -> None:
    """Writes report.json, from what `tarflow_jax.reporting` collects."""
    s = found['samples']
    images = s.get('denoised', s['raw'])
    rows = []
    for row, (name, alt) in enumerate(lead.row_names(found)):
        pixels = markup.sheet(images[row], images.shape[1])
        height, width = pixels.shape[:2]
        rows.append(dict(
            name=name, alt=alt, picture=markup.encoded(pixels), width=width, height=height
        ))
    content = {
        'origin': found['origin'],
        'date': found['date'],
        'model': found['model'],
        'parameters': found['parameters'],
        'train': found['data']['train'],
        'noise_std': found['noise_std'],
        'lowest_noise_std': found['lowest_noise_std'],
        'guidance': found['guidance'],
        'denoises': found['denoises'],
        'columns': images.shape[1],
        'samples': rows,
    }
    files.write_text(workdir / FILE, json.dumps(json_files.sealed(content), indent=2) + '\n')


def read(workdir) -> dict | None:
    """Reads report.json; None if it is missing or damaged."""
    path = workdir / FILE
    try:
        found = json_files.read(path, _SHAPE)
        for one in found['samples']:
            if not re.fullmatch(r'data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+', one['picture']):
                raise json_files.Damaged(f'the picture of {one["name"]!r:.40} is no data URI')
        return found
    except FileNotFoundError:
        return None
    except json_files.Damaged as error:
        log.warning('%s is damaged and ignored: %s; --mode=report writes it again', path, error)
        return None
