"""Estimates the least memory that a config needs, before anything is allocated.

The estimate is a lower bound, so that no config is refused that would run. `ahead_of_time` gets the
exact number from the compiler.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

from tarflow_jax.flow.flow import Flow
from tarflow_jax.flow.parameters import is_parameter
from tarflow_jax.training import sharding

GIB = 2**30
_SIZES = (
    'image_size', 'image_channels', 'patch_size', 'width', 'layers_per_block', 'num_classes',
    'num_features',
)
_CGROUP = ('/sys/fs/cgroup/memory.max', '/sys/fs/cgroup/memory/memory.limit_in_bytes')


def parameter_count(model: Flow) -> int:
    """Counts the trained parameters."""
    return sum(p.size for p in jax.tree.leaves(model.parameters(), is_leaf=is_parameter))


def of_parameters(model: Flow, mesh) -> int:
    """Returns the bytes per device of one float32 copy of the parameters."""
    parts = jax.tree.leaves(model.parameters(), is_leaf=is_parameter)
    return sum(4 * p.size // sharding.split_into(p.axes, mesh) for p in parts)


def of_training(model: Flow, mesh, batch_size: int, *, ema: bool, accumulation: int) -> int:
    """Returns the bytes per device that a train step needs.

    Counts the parameters, gradients, two moments and the average if there is one; and the input of
    every layer, which the backward pass needs even if it recomputes the rest.
    """
    images = max(1, batch_size // accumulation // sharding.batch_multiple(mesh))
    tokens, _ = model.token_shape
    kept = sum(model.layers_per_block) * images * tokens * model.width * _itemsize(model)
    return (4 + ema) * of_parameters(model, mesh) + kept + _logits(model, tokens)


def of_sampling(model: Flow, mesh, batch_size: int) -> int:
    """Returns the bytes per device to sample a batch: parameters, noise, keys and values."""
    images = max(1, batch_size // sharding.batch_multiple(mesh))
    tokens, size = model.token_shape
    cached = 2 * max(model.layers_per_block) * model.width * _itemsize(model)
    cached //= mesh.shape[sharding.TENSOR]
    return of_parameters(model, mesh) + images * tokens * (4 * size + cached)


def of_scoring(model: Flow, mesh, batch_size: int) -> int:
    """Returns the bytes per device for the likelihood of a batch."""
    images = max(1, batch_size // sharding.batch_multiple(mesh))
    tokens, size = model.token_shape
    activations = images * tokens * (4 * size + model.width * _itemsize(model))
    return of_parameters(model, mesh) + activations + _logits(model, tokens)


def check(needed: int, model: Flow, mesh, what: str) -> str:
    """Describes the needed and the available memory: 'at least 1.2 GiB of 15.8 GiB on each device'.

    Raises:
      ValueError: if the devices have less.
    """
    there = device_memory(mesh)
    if there is None:
        return f'at least {in_gib(needed)} on each device'
    if needed > there:
        sizes = ', '.join(f'{name} {getattr(model, name)}' for name in _SIZES)
        raise ValueError(
            f'{what} needs at least {in_gib(needed)} on each device for a flow of '
            f'{parameter_count(model):,} parameters (model.{sizes}), and '
            f'a device ({mesh.devices.flat[0].device_kind}) has {in_gib(there)}; choose smaller '
            'sizes, a smaller batch, or more devices and a larger mesh.fsdp.'
        )
    return f'at least {in_gib(needed)} of {in_gib(there)} on each device'


def device_memory(mesh) -> int | None:
    """Returns the bytes that a device of this process has; None if it does not tell."""
    device = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
    if device.platform != 'cpu':
        return (device.memory_stats() or {}).get('bytes_limit')
    return _host_memory() // jax.local_device_count()


def _host_memory() -> int:
    limits = [os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')]
    for path in _CGROUP:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or 'max'
            continue
    return min(limits)


def in_gib(size: int) -> str:
    if size < GIB:
        return f'{-(-size // 2**20)} MiB'
    return f'{size / GIB:,.1f} GiB' if size < 100 * GIB else f'{size // GIB:,} GiB'


def _itemsize(model: Flow) -> int:
    return jnp.dtype(model.dtype).itemsize


def _logits(model: Flow, tokens: int) -> int:
    """Returns the bytes of one head's attention logits for one image; 0 if never held at once."""
    return 4 * tokens**2 if model.layout.kernel(model.dtype, tokens) == 'xla' else 0
