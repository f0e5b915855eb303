"""The least memory that a config needs, reckoned before anything is allocated.

Only what cannot be avoided counts, so that nothing is refused that would run; `ahead_of_time` asks
the compiler for the rest.
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
    """Numbers that are trained."""
    return sum(p.size for p in jax.tree.leaves(model.parameters(), is_leaf=is_parameter))


def of_parameters(model: Flow, mesh) -> int:
    """Bytes of one float32 copy of the parameters on a device."""
    parts = jax.tree.leaves(model.parameters(), is_leaf=is_parameter)
    return sum(4 * p.size // sharding.split_into(p.axes, mesh) for p in parts)


def of_training(model: Flow, mesh, batch_size: int, *, ema: bool, accumulation: int) -> int:
    """Bytes that a train step needs on a device.

    Parameters, gradients, two moments and perhaps the average; and what every layer starts from,
    which the backward pass needs, even where it recomputes the rest.
    """
    images = max(1, batch_size // accumulation // sharding.batch_multiple(mesh))
    tokens, _ = model.token_shape
    kept = sum(model.layers_per_block) * images * tokens * model.width * _itemsize(model)
    return (4 + ema) * of_parameters(model, mesh) + kept + _logits(model, tokens)


def of_sampling(model: Flow, mesh, batch_size: int) -> int:
    """Bytes that drawing a batch needs on a device: parameters, noise, keys and values."""
    images = max(1, batch_size // sharding.batch_multiple(mesh))
    tokens, size = model.token_shape
    cached = 2 * max(model.layers_per_block) * model.width * _itemsize(model)
    cached //= mesh.shape[sharding.TENSOR]
    return of_parameters(model, mesh) + images * tokens * (4 * size + cached)


def of_scoring(model: Flow, mesh, batch_size: int) -> int:
    """Bytes that the likelihood of a batch needs on a device."""
    images = max(1, batch_size // sharding.batch_multiple(mesh))
    tokens, size = model.token_shape
    activations = images * tokens * (4 * size + model.width * _itemsize(model))
    return of_parameters(model, mesh) + activations + _logits(model, tokens)


def check(needed: int, model: Flow, mesh, what: str) -> str:
    """Says what is needed and what there is: '1.2 GiB of 15.8 GiB'.

    Raises:
      ValueError: if the devices cannot hold it.
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
    """Bytes that a device of this process has; None if it does not say."""
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
    """Of one head of one image, where the kernel holds them all."""
    return 4 * tokens**2 if model.layout.kernel(model.dtype, tokens) == 'xla' else 0
