"""Picks the numbers of each score that people quote, for the box of scores and for comparisons."""

from typing import NamedTuple


class Headline(NamedTuple):
    """One number of a score as text: what it is, its value, how it was made and at which step."""

    name: str
    value: str
    note: str
    step: int | None = None


def headlines(evaluation: dict | None) -> list[Headline]:
    """Returns the headlines of an evaluation.json; a score may have several or none."""
    found = []
    for name, result in (evaluation or {'scores': {}})['scores'].items():
        step = result.get('from', evaluation)['checkpoint'].get('step')
        found += [one._replace(step=step) for one in _PICK.get(name, lambda _: [])(result)]
    return found


def _bits_per_dim(r: dict) -> list[Headline]:
    value, note = f'{r["bits_per_dim"]:.3f}', f'{r["images"]:,} test images'
    return [Headline('bits per dimension', value, note)]


def _classification(r: dict) -> list[Headline]:
    images = f'{r["images"]:,} test images'
    return [
        Headline('classified right', f'{r["accuracy"]:.1%}', images),
        Headline('calibration error', f'{r["calibration_error"]:.3f}', images),
    ]


def _levels(r: dict) -> list[Headline]:
    return [Headline(
        f'bits per dimension at noise level {r["levels"][0]:.2g}', f'{r["bits_per_dim"][0]:.3f}',
        f'{r["images"]:,} test images',
    )]


def _frechet(r: dict) -> list[Headline]:
    name = 'FID' if r['is_fid'] else 'Frechet distance (not FID)'
    one = r['distances'][0]
    note = f'{r["samples"]:,} samples, to the {one["convention"]}'
    return [Headline(name, f'{one["distance"]:.2f}', note)]


def _outliers(r: dict) -> list[Headline]:
    return [
        Headline(f'AUROC against {one["set"]}', f'{one["auroc_atypical"]:.3f}', 'by atypical log p')
        for one in r['sets'] if 'auroc_atypical' in one
    ]


def _round_trip(r: dict) -> list[Headline]:
    found = []
    for dtype, passed in r['trusted'].items():
        uses = ' and '.join(use for use, good in passed.items() if good) or 'nothing'
        found.append(Headline(f'trusted in {dtype}', uses, f'{r["images"]:,} round trips'))
    return found


_PICK = {
    'bits_per_dim': _bits_per_dim,
    'classification': _classification,
    'levels': _levels,
    'frechet': _frechet,
    'outliers': _outliers,
    'round_trip': _round_trip,
}
