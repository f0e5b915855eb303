"""Published figures of Google's TPU chips, and the compiler's out-of-memory message.

Sources: the tables at docs.cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e and /tpu7x. They give the
interconnect bandwidth per chip as the sum of both directions (for v4 one direction, 2400 Gbit/s,
six links of 50 GB/s). `ici_bandwidth` is one direction; the tables' all-reduce bandwidth of a pod
confirms it (v5e: 256 chips x 200 GB/s = 51.2 TB/s). The bandwidth of the datacenter network is per
chip (v5p: 50 Gbit/s, v6e and TPU7x: 100) or per pod (v5e: 6.4 Tbit/s for 256 chips). That of v4 is
not published; it is assumed to equal v5p's.
"""

import dataclasses
import itertools
import re

# Latency of a collective per hop. It is not published; this guess has the right order of magnitude.
HOP_SECONDS = 1e-6
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The figures of a chip, or of the part of a chip that is one JAX device.

    Args:
      bf16_flops: peak FLOP/s.
      hbm_bytes: HBM capacity.
      usable_hbm_bytes: HBM that the TPU compiler lets a program use, from its error message.
      hbm_bandwidth: HBM bandwidth, bytes/s.
      ici_bandwidth: bytes/s that it sends to its neighbours over all ports together.
      torus_axes: dimensions of the interconnect; each axis has two ports.
      wrap: an axis of the slice forms a ring if its length is a multiple of this.
      clock: cycles/s of the compiler's estimates, derived from the peak and the size of the MXUs.
      dcn_bandwidth: bytes/s that it sends over the datacenter network, to other slices.
      devices: number of JAX devices per chip.
    """

    name: str
    bf16_flops: float
    hbm_bytes: float
    usable_hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    torus_axes: int
    wrap: int
    clock: float
    dcn_bandwidth: float
    devices: int = 1


CHIPS = {
    chip.name: chip
    for chip in (
        Chip('v4', 275e12, 32 * GIB, 30.5 * GIB, 1200e9, 300e9, 3, 4, 1.05e9, 6.25e9),
        Chip('v5e', 197e12, 16 * GIB, 15.75 * GIB, 819e9, 200e9, 2, 16, 1.5e9, 3.125e9),
        # Google's page says 95 GB, but the compiler allocates up to 95.74 GiB.
        Chip('v5p', 459e12, 96 * GIB, 95.74 * GIB, 2765e9, 600e9, 3, 4, 1.75e9, 6.25e9),
        Chip('v6e', 918e12, 32 * GIB, 31.25 * GIB, 1638e9, 400e9, 2, 16, 1.75e9, 12.5e9),
        # Two TensorCores; each is a device with half of the chip's HBM.
        Chip('tpu7x', 1153.5e12, 96 * GIB, 94.75 * GIB, 3690e9, 300e9, 3, 4, 2.2e9, 6.25e9, 2),
    )
}

# Lowest and highest ratio of measured to predicted step time, for the published runs on each chip
# in benchmarks/published_steps.py.
MEASURED = {'v5e': (1.07, 1.17), 'v5p': (0.96, 0.96)}


def measured_range(chip: str) -> tuple[tuple[float, float], tuple[str, ...]]:
    """Returns the range in MEASURED for a chip and its chips; all chips if it has no runs."""
    chips = (chip,) if chip in MEASURED else tuple(MEASURED)
    lows, highs = zip(*(MEASURED[name] for name in chips))
    return (min(lows), max(highs)), chips


_SIZE = r'(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?'
_MESSAGES = (
    re.compile(rf'Used {_SIZE} of {_SIZE} hbm', re.IGNORECASE),
    re.compile(rf'\({_SIZE}\) exceeds available HBM \({_SIZE}\)', re.IGNORECASE),
)


def out_of_memory(message: str) -> tuple[int, int] | None:
    """Returns the needed and available bytes of HBM in a RESOURCE_EXHAUSTED error.

    Returns None if the compiler's message is about anything else.
    """
    for pattern in _MESSAGES:
        if found := pattern.search(message):
            size, unit, limit, limit_unit = found.groups()
            return _bytes(size, unit), _bytes(limit, limit_unit)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * 1024 ** ' KMGT'.index(unit.upper() or ' '))


@dataclasses.dataclass(frozen=True)
class Slice:
    """A box of chips that runs a program.

    Args:
      shape: number of chips along each axis, such as (16, 16); trailing axes of 1 may be left out.
      coordinates: coordinates of each partition of the program, in the order of the mesh's devices
        (`device.coords`). By default partitions are in row-major order.
      slices: number of equal slices, joined by the datacenter network, that run the program.
    """

    chip: Chip
    shape: tuple[int, ...]
    coordinates: tuple[tuple[int, ...], ...] = ()
    slices: int = 1

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """Returns the coordinates of every partition."""
        return self.coordinates or tuple(itertools.product(*map(range, self.shape)))

    def _axes(self, groups: tuple[tuple[int, ...], ...]) -> dict[int, int]:
        """Returns the axes that a group spans, each with the number of positions on it."""
        places = self.places
        reach = [
            {axis: len(set(along)) for axis, along in enumerate(zip(*(places[i] for i in group)))}
            for group in groups
        ]
        widest = {axis: max(r[axis] for r in reach) for axis in reach[0]}
        return {axis: size for axis, size in widest.items() if size > 1}

    def _bandwidth(self, axis: int) -> float:
        """Returns the bytes/s that a chip sends along an axis: with both ports, or half if open."""
        ring = self.shape[axis] % self.chip.wrap == 0
        return self.chip.ici_bandwidth / self.chip.torus_axes * (1.0 if ring else 0.5)

    def collective_seconds(
        self, kind: str, num_bytes: float, groups: tuple[tuple[int, ...], ...]
    ) -> float:
        """Returns the time of one collective on an otherwise idle interconnect.

        The model uses rings along all axes of a group at once; each chip uses both ports of these
        axes. An all-reduce sends 2 (n-1)/n of its bytes, an all-gather or reduce-scatter (n-1)/n of
        the full array. The middle of its longest axis limits an all-to-all. A permutation sends all
        its bytes through one port; the model ignores that routes may cross.

        Args:
          num_bytes: bytes per device of the reduced or permuted array, or of the full (gathered)
            array.
          groups: groups of devices; for a permutation (source, target) pairs.
        """
        axes = self._axes(groups)
        size = max(len(set(group)) for group in groups)
        if size == 1:
            return 0.0
        port = self.chip.ici_bandwidth / self.chip.torus_axes / 2
        hops = sum(size - 1 for size in axes.values()) or 1
        bandwidth = sum(self._bandwidth(axis) for axis in axes) or self.chip.ici_bandwidth
        if kind == 'collective-permute':
            return num_bytes / port + HOP_SECONDS
        if kind == 'all-reduce':
            return 2 * (size - 1) / size * num_bytes / bandwidth + 2 * hops * HOP_SECONDS
        seconds = (size - 1) / size * num_bytes / bandwidth
        if kind in ('all-to-all', 'ragged-all-to-all'):
            across = (n / 4 * num_bytes / self._bandwidth(axis) for axis, n in axes.items())
            seconds = max([seconds, *across])
        return seconds + hops * HOP_SECONDS

    def dcn_seconds(self, kind: str, num_bytes: float) -> float:
        """Returns the time of an exchange between slices; every chip sends its part in a ring.

        Args:
          num_bytes: bytes per device: the input of an all-reduce, reduce-scatter or all-gather, or
            what it sends to one other device.
        """
        others = self.slices - 1
        share = {'all-reduce': 2 * others / self.slices, 'reduce-scatter': others / self.slices}
        sent = share.get(kind, others if kind == 'all-gather' else 1)
        return sent * num_bytes / self.chip.dcn_bandwidth
