"""Slices of TPUs by name, described by the TPU compiler on a machine without TPUs."""

import dataclasses
import math
import os
import re

import jax
from jax.experimental import topologies

from tarflow_jax.ahead_of_time.chips import CHIPS, Slice


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of TPU chips, or several of the same kind joined by the datacenter network.

    Args:
      name: a name such as 'v5e:16x16', 'v4:4x4x4' or '2*v5e:16x16' for two slices.
      devices: devices for a mesh, as `jax.devices()` would return them on the slice.
    """

    name: str
    chip: str
    shape: tuple[int, ...]
    slices: int
    devices: tuple

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    def where(self, mesh) -> Slice:
        """Returns the coordinates of every partition of a program for a mesh of its devices.

        With several slices, each slice runs its own program. Collectives stay within a slice; sends
        and receives connect the slices.
        """
        axes, devices = len(self.shape), mesh.devices.flat[: mesh.size // self.slices]
        places = tuple(tuple(device.coords[:axes]) for device in devices)
        return Slice(CHIPS[self.chip], self.shape, places, self.slices)


def check(name: str) -> tuple[str, tuple[int, ...], int]:
    """Parses a name into chip, shape and number of slices; raises ValueError if it cannot."""
    found = re.fullmatch(r'(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)', name)
    if not found or found[2] not in CHIPS:
        raise ValueError(
            f'--topology {name!r} must be one of {", ".join(CHIPS)} with a shape, such as '
            'v5e:16x16, v4:4x4x4, or 2*v5e:16x16 for two slices.'
        )
    chip, shape = found[2], tuple(map(int, found[3].split('x')))
    axes = CHIPS[chip].torus_axes
    if len(shape) != axes:
        example = 'x'.join(['4'] * axes)
        raise ValueError(
            f'--topology {name!r}: slices of {chip} have {axes} axes, such as {example}.'
        )
    return chip, shape, int(found[1] or 1)


def describe(name: str) -> Topology:
    """Returns the topology of this name, from the TPU compiler (libtpu).

    Raises:
      ValueError: if the topology does not exist, or libtpu is not installed.
    """
    chip, shape, slices = check(name)
    os.environ |= {
        # Skip the query for the TPU of this machine, which has none. (JAX queried at its import.)
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': f'{chip}-{CHIPS[chip].devices}',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # there is no chip to compete for
    }
    jax.config.update('jax_platforms', 'cpu')
    try:
        import libtpu  # noqa: F401
    except ImportError:
        raise ValueError(
            "--mode=compile needs the TPU compiler; install it with pip install 'tarflow-jax[tpu]'."
        ) from None
    more = {'num_slices': slices} if slices > 1 else {}
    if chip == 'v4':
        more['chip_config_name'] = 'megacore'  # one device per chip, as on a real v4
    text = 'x'.join(map(str, shape))
    try:
        found = topologies.get_topology_desc(
            platform='tpu', topology_name=f'{chip}:{text}', **more
        )
    except Exception as error:  # the plugin may raise anything
        raise ValueError(f'--topology {name!r} is unknown to the TPU compiler: {error}') from error
    return Topology(name, chip, shape, slices, tuple(found.devices))
