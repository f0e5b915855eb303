"""Matches the class order of a flow to that of a dataset: label k must mean the same in both.

A label is a row of the class tables. The official code numbers class folders by sorted name. The
ImageNet site's downsampled datasets number classes by map_clsloc.txt, so the rows of an official
checkpoint must be reordered for them.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tarflow_jax.data import kinds, sources
from tarflow_jax.data.batch_files import CLASS_NAMES_FILE
from tarflow_jax.flow.flow import Flow, Variables

SORTED = 'sorted'  # stands for the unknown names of official checkpoints
_TABLE = 'class_embedding'

log = logging.getLogger(__name__)


class Classes(NamedTuple):
    """The classes of a flow or a dataset, as far as they are known.

    Args:
      names: class names by label; SORTED if only their order is known; None if nothing is.
      kind: the kind of the dataset, see `data.kinds`.
    """

    names: Sequence[str] | None
    kind: str | None = None

    @property
    def numbered(self) -> bool:
        """Whether labels are numbers in the files, and so the same for everyone."""
        return kinds.plain(self.kind) in kinds.NUMBERED

    @property
    def known_names(self) -> Sequence[str] | None:
        """The names by label; None if unknown."""
        return None if self.names == SORTED else self.names

    def remembered(self) -> dict[str, Any]:
        """Returns the JSON values that a checkpoint stores."""
        return {'class_names': self.names, 'kind': self.kind}


def of_source(model: Flow, source) -> Classes:
    """Returns the classes of a flow that is trained on a source (see `data.sources`)."""
    return Classes(source.class_names if model.num_classes else None, source.about.get('kind'))


def rows(flow: Classes, data: Classes, what: str) -> np.ndarray | None:
    """Returns the class-table row for each class of the dataset, int [N]; None if in order.

    Args:
      flow: the flow's classes; without names nothing is compared.
      data: the dataset's classes.
      what: the name of the flow in errors.

    Raises:
      ValueError: if the dataset does not name its classes, or has other classes.
    """
    if flow.names is None or (data.numbered and (flow.names == SORTED or data.names is None)):
        return None
    if data.names is None:
        order = 'by sorted name' if flow.names == SORTED else 'in the order of its training'
        raise ValueError(
            f'{what} numbers its classes {order}, but the dataset of data.path has no class names; '
            f'put {CLASS_NAMES_FILE} next to its files and prepare it in another --out, or set '
            'data.path to a dataset of class folders.'
        )
    own = sorted(data.names) if flow.names == SORTED else list(flow.names)
    if set(own) != set(data.names):
        only = (next((k for k in a if k not in b), None) for a, b in (
            (own, data.names), (data.names, own)
        ))
        raise ValueError(
            f'{what} has {len(own)} classes and the dataset of data.path has {len(data.names)}, '
            'and they differ ({!r} is only in the first, {!r} only in the second); set data.path '
            'to a dataset with the classes that the flow was trained on.'.format(*only)
        )
    row_of = {name: row for row, name in enumerate(own)}
    found = np.array([row_of[name] for name in data.names])
    return None if (found == np.arange(len(found))).all() else found


def official_rows(flow: Classes) -> tuple[np.ndarray | None, Sequence[str] | None]:
    """Returns the rows in the order of official checkpoints, as `rows` does, and their names."""
    names = flow.known_names
    if names is None or flow.numbered:
        return None, names
    return rows(flow, Classes(sorted(names)), ''), sorted(names)


def reorder(variables: Variables, rows: np.ndarray | None) -> Variables:
    """Returns the variables with reordered class tables; the same object for None."""
    if rows is None:
        return variables

    def leaf(path, value):
        if path[-1].key != _TABLE:
            return value
        if isinstance(value, jax.Array):  # it keeps its sharding
            return jax.jit(lambda table: table[rows], out_shardings=value.sharding)(value)
        return value[rows]

    return jax.tree.map_with_path(leaf, variables)


def in_order(model: Flow, variables: Variables, flow: Classes, source, origin: dict) -> Variables:
    """Returns the variables with their class tables in the order of a source.

    Args:
      flow: the classes of the variables.
      origin: describes the origin of the variables; errors use its 'name', and it gets an entry if
        the order changes.

    Raises:
      ValueError: see `rows`.
    """
    return _in_order(model, variables, flow, of_source(model, source), origin)[0]


def at_hand(
    data, model: Flow, variables: Variables, flow: Classes, origin: dict
) -> tuple[Variables, Classes]:
    """Does the same for work that needs no dataset: converts an official order, if possible.

    Args:
      data: the config's section `data`. If its dataset is not available, the order is kept.

    Returns:
      the variables and their classes.
    """
    if flow.names != SORTED or not model.num_classes:
        return variables, flow
    try:
        classes = Classes(*sources.classes(data.source, path=data.path, name=data.name))
    except (FileNotFoundError, ValueError):
        log.info('%s numbers its classes by sorted name; the dataset of data.path is not available '
                 'for comparison', origin['name'])
        return variables, flow
    if classes.numbered and len(classes.names or ()) != model.num_classes:
        classes = classes._replace(names=None)
    return _in_order(model, variables, flow, classes, origin)


def check_same(flow: Classes, data: Classes, folder: str) -> None:
    """Raises ValueError if training cannot resume from the checkpoints of a folder."""
    if rows(flow, data, f'the checkpoint in {folder}') is not None:
        raise ValueError(
            f'the checkpoint in {folder} numbers its classes in another order than the dataset of '
            'data.path; resume with the dataset that it was trained on, or choose another '
            '--workdir (an official checkpoint can be converted again, with this data.path).'
        )


def _in_order(model, variables, flow: Classes, data: Classes, origin: dict):
    if not model.num_classes:
        return variables, data
    if data.names and len(data.names) != model.num_classes:
        raise ValueError(
            f'model.num_classes = {model.num_classes}, but the dataset of data.path has '
            f'{len(data.names)} classes; correct one of them.'
        )
    found = rows(flow, data, origin['name'])
    if found is not None:
        origin['class_order'] = 'changed to that of the set'
        log.info('%s: reordered its class tables to match the dataset of data.path',
                 origin['name'])
    return reorder(variables, found), data
