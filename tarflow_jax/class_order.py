"""The order of a flow's classes against that of a set: label k must mean the same to both.

A label is a row of the class tables. The official code numbers the folders of classes in the order
of their sorted names. The ImageNet site's downsampled sets number them as map_clsloc.txt does, so
an official checkpoint meets them with its rows in another order.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from tarflow_jax.data import kinds, sources
from tarflow_jax.data.batch_files import CLASS_NAMES_FILE
from tarflow_jax.flow.flow import Flow, Variables

SORTED = 'sorted'  # in place of the names of official checkpoints
_TABLE = 'class_embedding'

log = logging.getLogger(__name__)


class Classes(NamedTuple):
    """What is known of a flow's or a set's classes.

    Args:
      names: by label; SORTED where only their order is known; None where nothing is.
      kind: of the set, see `data.kinds`.
    """

    names: Sequence[str] | None
    kind: str | None = None

    @property
    def numbered(self) -> bool:
        """Whether labels are numbers in the files, the same for all who read them."""
        return kinds.plain(self.kind) in kinds.NUMBERED

    @property
    def known_names(self) -> Sequence[str] | None:
        """The names by label; None where they are not known."""
        return None if self.names == SORTED else self.names

    def remembered(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON values."""
        return {'class_names': self.names, 'kind': self.kind}


def of_source(model: Flow, source) -> Classes:
    """What a source, see `data.sources`, tells of the classes of a flow that is trained on it."""
    return Classes(source.class_names if model.num_classes else None, source.about.get('kind'))


def rows(flow: Classes, data: Classes, what: str) -> np.ndarray | None:
    """The row of the class tables for each class of the set: int [N]; None if row k is class k.

    Args:
      flow: what is known of the flow's classes; without names nothing is compared.
      data: of the set's.
      what: what to call the flow in an error.

    Raises:
      ValueError: the set does not name its classes, or has others.
    """
    if flow.names is None or (data.numbered and (flow.names == SORTED or data.names is None)):
        return None
    if data.names is None:
        order = 'of their sorted names' if flow.names == SORTED else 'that it was trained with'
        raise ValueError(
            f'{what} numbers its classes in the order {order}, and the set of data.path does not '
            f'name its classes; put {CLASS_NAMES_FILE} beside the files of the set and prepare it '
            'in another --out, or set data.path to a set of class folders.'
        )
    own = sorted(data.names) if flow.names == SORTED else list(flow.names)
    if set(own) != set(data.names):
        only = (next((k for k in a if k not in b), None) for a, b in (
            (own, data.names), (data.names, own)
        ))
        raise ValueError(
            f'{what} knows {len(own)} classes and the set of data.path has {len(data.names)}, and '
            'they differ ({!r} is only among the first, {!r} among the second); set data.path to a '
            'set with the classes that the flow was trained on.'.format(*only)
        )
    row_of = {name: row for row, name in enumerate(own)}
    found = np.array([row_of[name] for name in data.names])
    return None if (found == np.arange(len(found))).all() else found


def official_rows(flow: Classes) -> tuple[np.ndarray | None, Sequence[str] | None]:
    """The rows in the order of official checkpoints, as `rows` gives them, and their names."""
    names = flow.known_names
    if names is None or flow.numbered:
        return None, names
    return rows(flow, Classes(sorted(names)), ''), sorted(names)


def reorder(variables: Variables, rows: np.ndarray | None) -> Variables:
    """The variables with these rows of their class tables; the same object for None."""
    if rows is None:
        return variables

    def leaf(path, value):
        if path[-1].key != _TABLE:
            return value
        if isinstance(value, jax.Array):  # which stays where it lies
            return jax.jit(lambda table: table[rows], out_shardings=value.sharding)(value)
        return value[rows]

    return jax.tree.map_with_path(leaf, variables)


def in_order(model: Flow, variables: Variables, flow: Classes, source, origin: dict) -> Variables:
    """The variables with their class tables in the order of a source.

    Args:
      flow: what is known of the classes of the variables.
      origin: says where the variables come from; its 'name' is for errors, and it gets an entry
        where the order changes.

    Raises:
      ValueError: see `rows`.
    """
    return _in_order(model, variables, flow, of_source(model, source), origin)[0]


def at_hand(
    data, model: Flow, variables: Variables, flow: Classes, origin: dict
) -> tuple[Variables, Classes]:
    """The same for work that needs no set: an official order gives way to that of the config's set.

    Args:
      data: the config's section of that name. Where its set is not here, the order stays.

    Returns:
      the variables, and what is known of their classes then.
    """
    if flow.names != SORTED or not model.num_classes:
        return variables, flow
    try:
        classes = Classes(*sources.classes(data.source, path=data.path, name=data.name))
    except (FileNotFoundError, ValueError):
        log.info('%s numbers its classes in the order of their sorted names; the set of data.path '
                 'is not here to compare', origin['name'])
        return variables, flow
    if classes.numbered and len(classes.names or ()) != model.num_classes:
        classes = classes._replace(names=None)
    return _in_order(model, variables, flow, classes, origin)


def check_same(flow: Classes, data: Classes, folder: str) -> None:
    """ValueError where training cannot go on from the checkpoints of a folder with a set."""
    if rows(flow, data, f'the checkpoint in {folder}') is not None:
        raise ValueError(
            f'the checkpoint in {folder} numbers its classes in another order than the set of '
            'data.path; go on with the set that it was trained on, or choose another --workdir '
            '(an official checkpoint can be converted again, with this data.path).'
        )


def _in_order(model, variables, flow: Classes, data: Classes, origin: dict):
    if not model.num_classes:
        return variables, data
    if data.names and len(data.names) != model.num_classes:
        raise ValueError(
            f'model.num_classes = {model.num_classes}, but the set of data.path has '
            f'{len(data.names)} classes; correct one of them.'
        )
    found = rows(flow, data, origin['name'])
    if found is not None:
        origin['class_order'] = 'changed to that of the set'
        log.info('%s: its class tables are put into the order of the set of data.path',
                 origin['name'])
    return reorder(variables, found), data
