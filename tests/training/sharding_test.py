"""The mesh, the table of rules, and cores as devices."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tarflow_jax.training import sharding


def test_batches_are_split_and_parameters_copied():
    mesh = sharding.make_mesh()
    assert mesh.size == 8 and mesh.axis_names == ('data',)
    batch = sharding.to_devices({'image': np.arange(16).reshape(16, 1), 'mask': np.ones(8)}, mesh)
    shards = batch['image'].addressable_shards
    assert [s.data.ravel().tolist() for s in shards] == [[i, i + 1] for i in range(0, 16, 2)]
    copies = jax.device_put(np.arange(3), sharding.replicated(mesh)).addressable_shards
    assert [s.data.tolist() for s in copies] == [[0, 1, 2]] * 8


COUNT_DEVICES = """
import os
os.sched_getaffinity = lambda pid: set(range({cores}))
from tarflow_jax.training import sharding
sharding.use_cores_as_devices({batch_size})
import jax
print(jax.device_count())
"""


@pytest.mark.parametrize('cores, batch_size, flags, count', [
    (6, 32, '', 4),
    (64, 128, '', 8),
    (4, 8, '--xla_force_host_platform_device_count=3', 3),
])
def test_number_of_devices_divides_the_batch(cores, batch_size, flags, count):
    ran = subprocess.run(
        [sys.executable, '-c', COUNT_DEVICES.format(cores=cores, batch_size=batch_size)],
        env={**os.environ, 'XLA_FLAGS': flags}, capture_output=True, text=True, timeout=60,
        check=True,
    )
    assert int(ran.stdout) == count
