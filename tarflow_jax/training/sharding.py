"""Where arrays live: the device mesh and the one table of sharding rules."""

import os

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA = 'data'


def use_cores_as_devices(batch_size: int) -> None:
    """Makes each core of a CPU-only machine its own device. Call before JAX's backend starts.

    XLA's elementwise loops and some of its matmuls keep one core busy, so two cores as two devices
    train about a fifth faster than as one. Their number divides the batch. Does nothing for
    accelerators, or where XLA_FLAGS already decides.
    """
    if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
        return
    affinity = getattr(os, 'sched_getaffinity', None)  # Linux only
    cores = min(len(affinity(0)) if affinity else os.cpu_count(), 8)
    jax.config.update(
        'jax_num_cpu_devices', max(n for n in range(1, cores + 1) if batch_size % n == 0)
    )


def make_mesh() -> Mesh:
    """All devices on one axis, `data`."""
    return jax.make_mesh((jax.device_count(),), (DATA,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Parameters, optimizer state and averages: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Batches, noise, samples and caches: the leading axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def to_devices(batch, mesh: Mesh):
    """Host arrays of this process's share of a batch to global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )
