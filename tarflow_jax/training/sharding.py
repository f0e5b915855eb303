"""The device mesh, and the tables of rules that say how arrays are sharded over it.

Mesh axes: `data` shards the batch. `fsdp` shards the batch too, and parameters, averages and
optimizer state, which are gathered layer by layer. `tensor` shards heads and hidden channels.
"""

import dataclasses
import functools
import math
import os
import re

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tarflow_jax.data.cores import available_cores
from tarflow_jax.flow.attention import causal_attention, check_kernel, kernel_for
from tarflow_jax.flow.block import Block
from tarflow_jax.flow.parameters import abstract, is_parameter

DATA, FSDP, TENSOR = AXES = ('data', 'fsdp', 'tensor')
BATCH, BOTH = (DATA, FSDP), (FSDP, TENSOR)
TENSOR_FSDP = (TENSOR, FSDP)  # for axes that the computation shards over `tensor` already

# How to shard the logical axes of `flow.parameters`, for parameters, their averages and the
# optimizer's moments. The last axis of a large kernel is not sharded: TPUs pad it to a multiple of
# 128.
PARAMETER_AXES = {
    'layers': None,
    'position': None,
    'class': None,
    'feature': None,
    'token': None,
    'prediction': None,
    'qkv': None,
    'width': BOTH,
    'inputs': FSDP,
    'outputs': None,
    'heads': TENSOR,
    'head_dim': None,
    'head_inputs': FSDP,
    'hidden': TENSOR,
    'hidden_inputs': TENSOR_FSDP,
}
# How to shard the axes of activations and key/value caches.
ACTIVATION_AXES = {
    'batch': BATCH,
    'length': None,
    'token': None,
    'width': None,
    'hidden': TENSOR,
    'heads': TENSOR,
    'head_dim': None,
}
# Arrays of a train state that are not parameters of a block; they are replicated.
WHOLE = r'(^|/)(prior/variance|variance|step|skipped|count)$'


def use_cores_as_devices(batch_size: int) -> None:
    """Makes each core of a CPU-only machine a device. Call it before JAX's backend starts.

    XLA runs elementwise loops and some matmuls on one core only, so two cores train about a fifth
    faster as two devices than as one. The number of devices divides the batch. Accelerators are
    unaffected, and so is a number of devices set by XLA_FLAGS.
    """
    if 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
        return
    cores = min(available_cores(), 8)
    jax.config.update(
        'jax_num_cpu_devices', max(n for n in range(1, cores + 1) if batch_size % n == 0)
    )


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None) -> Mesh:
    """Makes a mesh of all devices with these axis sizes; one may be -1, for all that are left.

    Neighbours along `tensor` and `fsdp` are neighbours on the chip interconnect. If there are
    several slices, connected by the datacenter network only, `data` spans them.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = _sizes((data, fsdp, tensor), len(devices))
    slices = len({getattr(d, 'slice_index', 0) for d in devices})
    if sizes[0] % slices:
        raise ValueError(
            f'data {sizes[0]} cannot span {slices} slices, and only the data axis can; choose a '
            f'multiple of {slices}.'
        )
    if devices[0].platform != 'tpu':
        arranged = np.array(devices).reshape(sizes)  # in the order of the processes
    elif slices > 1:
        within = (sizes[0] // slices, *sizes[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        arranged = mesh_utils.create_device_mesh(
            sizes, devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(given: tuple[int, int, int], devices: int) -> tuple[int, int, int]:
    named = ', '.join(f'{axis} {size}' for axis, size in zip(AXES, given))
    if any(size < 1 and size != -1 for size in given) or given.count(-1) > 1:
        raise ValueError(
            f'{named} are invalid; each must be at least 1, and one may be -1, for all that are '
            'left.'
        )
    known = int(np.prod([size for size in given if size != -1]))
    rest = devices // known
    sizes = tuple(rest if size == -1 else size for size in given)
    if int(np.prod(sizes)) != devices:
        raise ValueError(
            f'{named} do not fit {devices} device(s); choose sizes whose product is {devices}.'
        )
    return sizes


def check(mesh: Mesh, batch_size: int, field: str, parts: int = 1) -> None:
    """Raises ValueError unless the mesh divides a batch, or each of its equal parts, evenly."""
    shards = batch_multiple(mesh) * parts
    if batch_size % shards:
        raise ValueError(
            f'{field} {batch_size} is not divisible by {shards // parts} devices'
            f'{f" times {parts} parts" if parts > 1 else ""}; choose a multiple of {shards}.'
        )


def batch_multiple(mesh: Mesh) -> int:
    """Returns the number by which a batch size must be divisible."""
    return mesh.shape[DATA] * mesh.shape[FSDP]


def round_up(batch_size: int, mesh: Mesh) -> int:
    """Rounds a batch size up to one that the mesh divides evenly."""
    multiple = batch_multiple(mesh)
    return -(-batch_size // multiple) * multiple


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of batches, noise and samples, over their leading axis."""
    return NamedSharding(mesh, P(BATCH))


def _parameter_axes() -> dict[str, tuple[str, ...]]:
    """Returns the logical axes of every parameter a block can have, by its path in the block."""
    everything = Block(
        length=2, token_dim=1, width=2, num_layers=1, head_dim=1, num_classes=1, num_features=1,
        noise_conditioned=True, first_token='start',
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator='/'): parameter.axes
        for path, parameter in jax.tree.leaves_with_path(
            everything.parameters(), is_leaf=is_parameter
        )
    }


_AXES_OF = _parameter_axes()


def _spec(path: str) -> P:
    """Returns the partition spec of the array at a path of a train state.

    The paths of averages and optimizer moments end with those of their parameters.
    """
    if re.search(WHOLE, path):
        return P()
    words = path.split('/')
    axes = next((_AXES_OF[tail] for i in range(len(words))
                 if (tail := '/'.join(words[i:])) in _AXES_OF), None)
    if axes is None:
        raise ValueError(f'{path} is no parameter of a flow, so no rule says how to shard it.')
    return _mapped(axes)


def _mapped(axes: tuple[str, ...]) -> P:
    missing = [axis for axis in axes if axis not in PARAMETER_AXES]
    if missing:
        raise ValueError(f'axis {missing[0]!r} is not in sharding.PARAMETER_AXES; add it.')
    return P(*(PARAMETER_AXES[axis] for axis in axes))


def _gathered(spec: P) -> P:
    return P(*(TENSOR if axes in (TENSOR, TENSOR_FSDP) else None for axes in spec))


def shardings(tree, mesh: Mesh):
    """Returns the sharding of every array of a train state or of variables.

    Args:
      tree: arrays or abstract arrays.
    Raises:
      ValueError: if a path is none of a flow's, or the mesh does not divide an axis evenly.
    """

    def leaf(path, x):
        path = jax.tree_util.keystr(path, simple=True, separator='/')
        spec = _spec(path)
        for size, axes in zip(x.shape, spec):
            axes = (axes,) if isinstance(axes, str) else axes or ()
            split = int(np.prod([mesh.shape[a] for a in axes], dtype=int))
            if size % split:
                raise ValueError(
                    f'{path} {x.shape}: its axis of {size} is not divisible by '
                    f'{" x ".join(f"{a} {mesh.shape[a]}" for a in axes)} of the mesh; choose sizes '
                    'that divide it.'
                )
        return NamedSharding(mesh, spec)

    return jax.tree.map_with_path(leaf, tree)


def split_into(axes: tuple[str, ...], mesh: Mesh) -> int:
    """Returns the number of shards of a parameter with these logical axes."""
    spec = _mapped(axes)
    names = [n for part in spec if part for n in ((part,) if isinstance(part, str) else part)]
    return math.prod(mesh.shape[name] for name in names)


def placed(tree, mesh: Mesh):
    """Returns the abstract tree with shardings."""
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(place, tree, shardings(tree, mesh))


@dataclasses.dataclass(frozen=True)
class Layout:
    """A flow's layout over a mesh: `Flow.layout`; see `flow.transformer.OneDevice`.

    Args:
      attention: the kernel, one of `flow.attention.KERNELS`; 'auto' chooses the chip's.
    """

    mesh: Mesh
    attention: str = 'auto'

    def constrain(self, x, *axes: str):
        spec = P(*(ACTIVATION_AXES[axis] for axis in axes))
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def gather(self, kernel, axes: tuple[str, ...]):
        spec = _gathered(_mapped(axes))
        return jax.lax.with_sharding_constraint(kernel, NamedSharding(self.mesh, spec))

    def to_host(self, x):
        return to_host(x)

    @property
    def devices_alone(self) -> bool:
        """Whether each device computes gradients alone: on a CPU, with replicated parameters."""
        platform = self.mesh.devices.flat[0].platform
        whole = self.mesh.shape[FSDP] == self.mesh.shape[TENSOR] == 1
        return platform == 'cpu' and whole and self.attention in ('auto', 'xla')

    def check_attention(self, model) -> None:
        """Raises ValueError unless the kernel runs on these devices."""
        platform = self.mesh.devices.flat[0].platform
        check_kernel(self.attention, platform, model.dtype, model.token_shape[0])

    def check_parameters(self, model) -> None:
        """Raises ValueError unless the mesh divides all parameters evenly."""
        shardings(abstract(model.parameters()), self.mesh)

    def kernel(self, dtype, length: int) -> str:
        if self.attention != 'auto':
            return self.attention
        return kernel_for(self.mesh.devices.flat[0].platform, dtype, length)

    def causal_attention(self, q, k, v, scale, precision='highest'):
        kernel = self.kernel(q.dtype, q.shape[2])
        attend = functools.partial(causal_attention, kernel, precision=precision)
        if kernel == 'xla' or self.mesh.size == 1:
            return attend(q, k, v, scale)
        # The partitioner cannot see into a kernel: each device runs it on its images and heads.
        spec = P(BATCH, TENSOR)
        scale = jax.numpy.broadcast_to(scale, (q.shape[0], 1, 1, 1))
        return jax.shard_map(
            attend, mesh=self.mesh, in_specs=(spec, spec, spec, P(BATCH)), out_specs=spec,
            check_vma=False,
        )(q, k, v, scale)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Returns the rows of a global batch that this process's devices hold, in order."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for (rows,) in places.values()]))


def split(tree, mesh: Mesh):
    """Shards host arrays [B, ...] over the mesh; every process has all of them. Keeps scalars."""

    def leaf(x):
        if np.ndim(x) == 0:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, batch_sharding(mesh), x.__getitem__)

    return jax.tree.map(leaf, tree)


def to_devices(batch, mesh: Mesh, batch_size: int):
    """Makes global arrays, sharded over the mesh, from this process's `local_rows` of a batch."""
    rows = local_rows(mesh, batch_size)

    def leaf(x):
        x = np.asarray(x)

        def shard(index):
            first, last = index[0].indices(batch_size)[:2]
            return x[np.searchsorted(rows, first) : np.searchsorted(rows, last - 1) + 1]

        shape = (batch_size, *x.shape[1:])
        return jax.make_array_from_callback(shape, batch_sharding(mesh), shard)

    return jax.tree.map(leaf, batch)


def to_host(tree):
    """Gathers global arrays as numpy arrays on every process; all processes must call it."""

    def leaf(x):
        if getattr(x, 'is_fully_addressable', True):
            return np.asarray(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(leaf, tree)
