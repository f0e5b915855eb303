"""The flags and config fields that are paths, and the one place that makes them absolute."""

import operator

from ml_collections import ConfigDict

from tarflow_jax import paths
from tarflow_jax.evaluation.frechet_score import CONVENTIONS

# What must be there if anything is: see `paths.resolved`.
FLAGS = {
    'workdir': 'folder', 'input': 'file', 'output': 'file', 'images': 'any', 'gif': 'file',
    'json': 'file', 'out': 'folder',
}
FIELDS = {
    'data.path': 'folder',
    'evaluate.outliers.path': 'folder',
    'evaluate.frechet.weights': 'file',
    'evaluate.frechet.references': 'file',  # or one of CONVENTIONS
    'evaluate.frechet.samples': 'any',
    'evaluate.frechet.statistics': 'folder',
}


def resolve(config: ConfigDict, given) -> None:
    """Makes every path of a command line absolute, or gs://, in place; see `paths.resolved`.

    Args:
      config: the fields; a value that is no text is left to whoever checks the field.
      given: the flags, as attributes.
    Raises:
      ValueError: if a path cannot be one, or is a file where a folder is meant.
    """
    for name, kind in FLAGS.items():
        if value := getattr(given, name):
            setattr(given, name, paths.resolved(value, f'--{name}={value}', kind))
    for field, kind in FIELDS.items():
        value = operator.attrgetter(field)(config)
        section, _, name = field.rpartition('.')
        if isinstance(value, tuple | list):
            new = tuple(_resolved(entry, field, kind) for entry in value)
        else:
            new = _resolved(value, field, kind)
        operator.attrgetter(section)(config)[name] = new


def _resolved(value, field: str, kind: str):
    if not isinstance(value, str) or not value or value in CONVENTIONS:
        return value
    return paths.resolved(value, f'{field} {value}', kind)
