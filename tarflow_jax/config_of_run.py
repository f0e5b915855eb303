"""Reads the training config that the checkpoints of a run store.

A command without --config uses all of it. A command with a config file takes only the model and
noise fields from the checkpoint, because with others it would read the checkpoint as another flow.
"""

from typing import Any, NamedTuple

from ml_collections import ConfigDict

from tarflow_jax import config as configs
from tarflow_jax import config_ranges, json_files, paths
from tarflow_jax.training import best_checkpoint

# Fields about how to compute, which may differ between machines.
_COMPUTING = ('attention', 'precision', 'remat', 'unroll')
_NOISE = ('noise', 'noise_std', 'lowest_noise_std', 'levels', 'weight')
# Fields that do not change the steps of training.
_ASIDE = (
    'data.workers', 'data.test_split', 'data.expects', 'train.log_every', 'train.sample_every',
    'train.checkpoint_every', 'train.validate_every', 'train.validation_images',
    'train.stop_after_skipped', 'model.attention', 'model.remat', 'model.unroll',
)


class Saved(NamedTuple):
    """The values of a checkpoint's config by field, such as 'model.width', and its location."""

    values: dict[str, Any]
    name: str


def saved(workdir: str, step: int | str | None = None) -> Saved | None:
    """Reads the config of a checkpoint; None if there is none.

    It does not start JAX, because the config determines flags that JAX reads at its start.

    Args:
      step: the step of the checkpoint, or 'best'. None is the newest, and so is a step without a
        checkpoint: whatever restores that checkpoint reports the error.
    """
    folder = paths.of(workdir) / 'checkpoints'
    try:
        steps = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
    except OSError:
        return None
    if step == best_checkpoint.NAME:
        step = best_checkpoint.best_of(best_checkpoint.validations(folder, steps))
    for found in sorted(steps, key=lambda number: (number != step, -number)):
        try:
            path = folder / str(found) / 'about' / 'metadata'
            values = json_files.read(path, {'config': dict})['config']
        except (OSError, json_files.Damaged):
            continue  # reading the checkpoint reports the damage later
        return Saved(config_ranges.fields(values), f'step {found} of {workdir}') if values else None
    return None


def whole(saved: Saved, training: bool) -> ConfigDict:
    """Returns a config with the values of a checkpoint; fields it lacks keep their defaults.

    Args:
      training: whether training resumes. If not, the mesh is that of this machine too.
    """
    config = configs.default()
    own = () if training else ('mesh.', 'model.attention')
    for field, default in config_ranges.fields(config.to_dict()).items():
        if field in saved.values and not isinstance(default, dict) and not field.startswith(own):
            _set(config, field, _as(default, saved.values[field]), saved.name)
    return config


def adopt(config: ConfigDict, saved: Saved, given: list[str]) -> dict[str, tuple[Any, Any]]:
    """Sets the model and noise fields to those of a checkpoint.

    Args:
      given: fields that the command sets, which keep their values.

    Returns:
      the changed fields, each with its old value and the value of the checkpoint.
    """
    now = config_ranges.fields(config.to_dict())
    wanted = [f'model.{name}' for name in config.model if name not in _COMPUTING]
    changed = {}
    for field in [*wanted, *(f'train.{name}' for name in _NOISE)]:
        if field in saved.values and field not in given:
            value = _as(now[field], saved.values[field])
            if value != now[field]:
                changed[field] = now[field], value
                _set(config, field, value, saved.name)
    return changed


def differences(there: dict, config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Returns the changed fields that affect training, with their old and new values.

    Args:
      there: the checkpoint's config, as nested dicts of JSON values.
    """
    before, now = config_ranges.fields(there), config_ranges.fields(config.to_dict())
    return {
        field: (_as(value, before[field]), value) for field, value in now.items()
        if field.partition('.')[0] in ('seed', 'model', 'data', 'train')
        and field not in _ASIDE and field in before and not isinstance(value, dict)
        and _as(value, before[field]) != value
    }


def told(changes: dict[str, tuple[Any, Any]]) -> str:
    """Describes the changes in a line: 'train.batch_size 16 instead of 8, ...'."""
    return ', '.join(
        f'{field} {_short(now)} instead of {_short(before)}'
        for field, (before, now) in changes.items()
    )


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:60]}...'


def _set(config: ConfigDict, field: str, value, where: str) -> None:
    *sections, name = field.split('.')
    section = config
    for part in sections:
        section = section[part]
    try:
        section[name] = value
    except TypeError:
        raise ValueError(
            f'{field} of the config in the checkpoint at {where} is {value!r:.100}, but must be '
            f'{config_ranges.kind_of(field, section[name])}; pass --config.'
        ) from None


def _as(like, value):
    """Converts a JSON value to a config value: lists to tuples, numbers to the default's type."""
    if isinstance(value, list):
        return tuple(_as(None, entry) for entry in value)
    if isinstance(like, float) and type(value) is int:
        return float(value)
    return value
