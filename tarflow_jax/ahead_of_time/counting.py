"""Counts the FLOPs, bytes and collectives of single instructions of a TPU program.

Bytes follow XLA's HloCostAnalysis: a fusion that reads only slices of an array counts the slices,
and one that updates a slice in place counts the slice. Three things differ: only HBM counts, not
VMEM; an asynchronous copy counts once, not at both its start and end; and padding counts.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from tarflow_jax.ahead_of_time import hlo
from tarflow_jax.ahead_of_time.chips import Slice

COLLECTIVES = (
    'all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all',
    'collective-permute', 'collective-broadcast',
)
FREE = frozenset(
    'parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id'
    ' opt-barrier add-dependency domain'.split()
)
_FREE_TARGETS = ('ConcatBitcast', 'AllocateBuffer', 'AssumeGatherIndicesInBound')
_SLICES = ('slice', 'dynamic-slice', 'gather')
_SAME_ELEMENTS = ('bitcast', 'reshape', 'transpose', 'convert', 'copy')

# (flops, flops with MXU padding, HBM bytes) of a Pallas kernel call; None for its own estimate.
KernelCost = Callable[[hlo.Instruction], tuple[float, float, float] | None]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Args:
      num_bytes: bytes per device of the reduced, exchanged or permuted arrays; for an all-gather
        the gathered arrays, for a reduce-scatter the unscattered ones.
      groups: groups of devices by partition number; for a permutation (source, target) pairs.
      largest: the largest of its operands and results.
      seconds: its time on an idle network.
      network: 'ici', or 'dcn' between slices.
    """

    kind: str
    num_bytes: int
    groups: tuple[tuple[int, ...], ...]
    largest: hlo.Array
    seconds: float
    network: str = 'ici'


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one run of an instruction.

    Args:
      flops: FLOPs of matrix products and convolutions (2 per multiply-add), and of kernels with an
        estimate.
      mxu_flops: FLOPs times MXU passes: a float32 product with precision 'highest' takes 6 passes,
        with 'high' 3.
      hbm_bytes: bytes read and written.
      compiler_seconds: the compiler's own estimate; 0 if it has none.
    """

    flops: float = 0.0
    mxu_flops: float = 0.0
    hbm_bytes: float = 0.0
    compiler_seconds: float = 0.0
    collective: Collective | None = None
    uncounted: bool = False


@dataclasses.dataclass(frozen=True)
class Counter:
    """Counts single instructions."""

    module: hlo.Module
    where: Slice
    kernel_cost: KernelCost | None

    def work(self, computation: hlo.Computation, i: hlo.Instruction) -> Work:
        moved = self.moved(computation, i)
        hbm_bytes = float(sum(size for space, size in moved if space == hlo.HBM))
        flops, mxu_flops = self._flops(computation, i)
        uncounted = False
        if i.opcode == 'custom-call' and 'tpu_custom_call' in i.attributes:
            told = self.kernel_cost and self.kernel_cost(i) or _cost_estimate(i)
            flops, mxu_flops, kernel_bytes = told or (0.0, 0.0, 0.0)
            hbm_bytes = kernel_bytes or hbm_bytes
            uncounted = not told
        cycles = i.backend_config.get('window_config', {}).get('estimated_cycles', 0)
        seconds = int(cycles) / self.where.chip.clock
        collective = self._collective(computation, i)
        return Work(flops, mxu_flops, hbm_bytes, seconds, collective, uncounted)

    def role(self, i: hlo.Instruction) -> str | None:
        """Returns 'start' or 'done' for an asynchronous operation, 'step' inside other work.

        TPU programs start and finish some collectives in fusions, and continue them in fusions that
        mostly compute. All of these contain the same collective, marked by a chain_id.
        """
        if i.opcode.endswith(('-start', '-done')):
            return i.opcode.rpartition('-')[2]
        if _between_slices(i):
            return 'start'
        if i.opcode != 'fusion':
            return None
        inside = [j for _, j in self._inside(i)]
        attributes = ' '.join(j.attributes for j in inside if j.opcode == 'custom-call')
        for role in ('Start', 'Done'):
            if f'"AsyncCollective{role}"' in attributes:
                return role.lower()
        return 'step' if any(_is_piece(j) for j in inside) else None

    def started(self, computation: hlo.Computation, done: hlo.Instruction) -> str:
        """Returns the name of the instruction that started the operation `done` waits for."""
        i = computation.by_name[done.operands[0]]
        if i.opcode == 'recv':  # it receives what is sent at the same rendezvous
            met = _between_slices(i, 'recv')
            i = next((j for j in computation.instructions if met and _between_slices(j) == met), i)
        while self.role(i) != 'start' and i.operands:  # `recv` has no start: the loop ends there
            operand = 0
            if i.opcode == 'get-tuple-element':
                source = computation.by_name[i.operands[0]]
                if self.role(source) == 'step':
                    callee = self.module.computations[source.computations()[0]]
                    handed_on = callee.root.operands[int(i.attribute('index'))]
                    operand, i = int(callee.by_name[handed_on].inside), source
                elif source.opcode == 'while':  # passes through a loop that does not wait for it
                    begin = computation.by_name[source.operands[0]]
                    if begin.opcode == 'tuple':
                        operand, i = int(i.attribute('index')), begin
            i = computation.by_name[i.operands[operand]]
        return i.name

    # FLOPs

    def _flops(self, computation: hlo.Computation, i: hlo.Instruction) -> tuple[float, float]:
        """Returns the FLOPs of an instruction and its callees, and FLOPs times MXU passes."""
        if i.opcode in ('dot', 'convolution'):
            operands = [computation.by_name[name].arrays[0] for name in i.operands]
            flops = (_dot_flops if i.opcode == 'dot' else _convolution_flops)(i, *operands)
            return flops, flops * _passes(i, [operand.dtype for operand in operands])
        flops = mxu_flops = 0.0
        if i.opcode in ('fusion', 'call') or i.opcode.endswith('-start'):
            for callee, inner in self._inside(i):
                more = self._flops(callee, inner)
                flops, mxu_flops = flops + more[0], mxu_flops + more[1]
        return flops, mxu_flops

    def _inside(self, i: hlo.Instruction) -> Iterator[tuple[hlo.Computation, hlo.Instruction]]:
        """Yields the instructions of the computations that an instruction calls."""
        for name in i.computations():
            callee = self.module.computations[name]
            for inner in callee.instructions:
                yield callee, inner

    # Bytes

    def moved(self, computation: hlo.Computation, i: hlo.Instruction) -> list[tuple[int, float]]:
        """Returns (memory space, bytes) of everything that an instruction reads and writes."""
        role = self.role(i)
        free = any(f'"{target}"' in i.attributes for target in _FREE_TARGETS)
        if free or i.opcode in FREE or role == 'done':
            return []
        operands = [computation.by_name[name].arrays for name in i.operands]
        reads = [(a.space, a.padded_bytes) for operand in operands for a in operand]
        writes = [(a.space, a.padded_bytes) for a in i.arrays]
        opcode, inner = i.opcode.removesuffix('-start'), None
        if opcode == 'async' or opcode == 'fusion':
            inner = self.module.computations[i.computations()[0]]
        if i.opcode.endswith('-start'):
            done = _done(computation, i)
            writes = [(a.space, a.padded_bytes) for a in done.arrays]
            opcode = inner.root.opcode if inner else opcode
        if i.opcode == 'fusion':
            reads = [
                (a.space, a.padded_bytes if touched is None else min(touched, a.padded_bytes))
                for number, operand in enumerate(operands)
                for touched in [self._touched(inner, inner.parameters[number].name)]
                for a in operand
            ]
            roots = [inner.root.name]
            if inner.root.opcode == 'tuple':
                roots = inner.root.operands
            if role == 'start':  # its first result is its operand
                writes = writes[1:]
            elif len(roots) == len(writes):
                written = [_written(inner, root) for root in roots]
                writes = [(s, size if w is None else w) for (s, size), w in zip(writes, written)]
        elif opcode in _SLICES:
            reads = [(reads[0][0], sum(size for _, size in writes)), *reads[1:]]
        elif opcode == 'dynamic-update-slice':
            reads, writes = reads[1:], [(reads[0][0], reads[1][1])]
        return reads + writes

    def _touched(self, computation: hlo.Computation, name: str) -> float | None:
        """Returns the bytes that a fusion reads of a parameter; None for all."""
        total = 0.0
        if computation.by_name[name].is_root:
            return None
        for user in computation.users[name]:
            first = user.operands.index(name) == 0 and user.operands.count(name) == 1
            if _is_piece(user) or user.is_root and user.opcode == 'tuple':
                size = 0.0
            elif user.opcode in _SLICES and first:
                size = user.arrays[0].padded_bytes
            elif user.opcode == 'dynamic-update-slice' and first:
                size = computation.by_name[user.operands[1]].arrays[0].padded_bytes
            elif user.opcode in _SAME_ELEMENTS:
                size = self._touched(computation, user.name)
            elif user.opcode == 'fusion':
                callee = self.module.computations[user.computations()[0]]
                sizes = [
                    self._touched(callee, callee.parameters[number].name)
                    for number, operand in enumerate(user.operands)
                    if operand == name
                ]
                size = None if None in sizes else sum(sizes)
            else:
                size = None
            if size is None:
                return None
            total += size
        return total

    # Collectives

    def _collective(self, computation: hlo.Computation, i: hlo.Instruction) -> Collective | None:
        """Returns the collective of an instruction, or the one that its fusion contains."""
        opcode = i.opcode.removesuffix('-start')
        if _between_slices(i):
            sent = computation.by_name[i.operands[0]].arrays[0]
            kind = _attribute_of_slices(i, '_megascale_transfer_type').lower().replace('_', '-')
            seconds = self.where.dcn_seconds(kind, sent.bytes)
            return Collective(f'{kind} of slices', sent.bytes, (), sent, seconds, 'dcn')
        if opcode not in COLLECTIVES:
            if i.opcode not in ('fusion', 'async-start') or self.role(i) == 'step':
                return None
            found = (self._collective(*inner) for inner in self._inside(i))
            return next(filter(None, found), None)
        taken = [a for name in i.operands for a in computation.by_name[name].arrays]
        groups = hlo.groups(i, self.module.num_devices)
        num_bytes = sum(array.bytes for array in taken)
        if opcode == 'all-gather':
            num_bytes *= max(map(len, groups))
        elif opcode == 'all-reduce' and _scatters(computation, i.name):
            opcode = 'reduce-scatter'  # the TPU's fused all-reduce and dynamic-slice
        largest = max((*taken, *i.arrays), key=lambda array: array.bytes)
        seconds = self.where.collective_seconds(opcode, num_bytes, groups)
        return Collective(opcode, num_bytes, groups, largest, seconds)


def _scatters(computation: hlo.Computation, name: str) -> bool:
    """Returns whether only slices of a fused all-reduce are used."""
    users = computation.users[name]
    return bool(users) and all(
        user.opcode == 'dynamic-slice'
        or user.opcode in _SAME_ELEMENTS
        and _scatters(computation, user.name)
        for user in users
    )


def _between_slices(i: hlo.Instruction, opcode: str = 'send') -> str | None:
    """Returns the rendezvous of a transfer between slices through the host; None otherwise."""
    if i.opcode != opcode or '_xla_megascale_transfer_type' not in i.attributes:
        return None
    return _attribute_of_slices(i, '_host_transfer_rendezvous')


def _attribute_of_slices(i: hlo.Instruction, name: str) -> str:
    found = re.search(rf'_xla{name}="([^"]*)"', i.attributes)
    return found[1] if found else ''


def _is_piece(i: hlo.Instruction) -> bool:
    """Returns whether it is one of the fused pieces of an asynchronous collective."""
    return i.opcode in COLLECTIVES and 'chain_id=' in i.attributes


def _done(computation: hlo.Computation, start: hlo.Instruction) -> hlo.Instruction:
    for user in computation.users[start.name]:
        if user.opcode.endswith('-done'):
            return user
        if user.opcode.endswith('-update'):
            return _done(computation, user)
    raise ValueError(f'No instruction waits for {start.name}.')


def _written(computation: hlo.Computation, name: str) -> float | None:
    """Returns the bytes a fusion writes if it updates a slice in place; None for all."""
    i = computation.by_name[name]
    while i.opcode == 'bitcast':
        i = computation.by_name[i.operands[0]]
    if i.opcode == 'parameter' or _is_piece(i):
        return 0.0
    if i.opcode != 'dynamic-update-slice':
        return None
    return computation.by_name[i.operands[1]].arrays[0].padded_bytes


def _cost_estimate(kernel: hlo.Instruction) -> tuple[float, float, float] | None:
    """Returns the `cost_estimate` of a `pallas_call`, as stored in the program."""
    estimate = kernel.backend_config.get('custom_call_config', {}).get('cost_estimate')
    if not estimate:
        return None
    flops = float(estimate['flops'])
    return flops, flops, float(estimate['bytes_accessed'])


def _passes(i: hlo.Instruction, dtypes: list[str]) -> int:
    """Returns the number of passes over the operands on the MXU, which multiplies bfloat16."""
    algorithm = i.attribute('algorithm') or ''
    if found := re.search(r'_x(\d)$', algorithm):
        return int(found.group(1))
    wide = sum(dtype in ('f32', 'f64') for dtype in dtypes)
    if not wide:
        return 1
    precision = re.findall(r'\w+', i.attribute('operand_precision') or '')
    if 'highest' in precision or algorithm == 'dot_f32_f32_f32':
        return 6 if wide == 2 else 3  # float32 is a sum of three bfloat16; low products are dropped
    return (3 if wide == 2 else 2) if 'high' in precision else 1


def _dot_flops(dot: hlo.Instruction, left: hlo.Array, right: hlo.Array) -> float:
    contracted = re.findall(r'\d+', dot.attribute('lhs_contracting_dims') or '')
    return 2.0 * math.prod(dot.arrays[0].dims) * math.prod(left.dims[int(d)] for d in contracted)


def _convolution_flops(i: hlo.Instruction, image: hlo.Array, kernel: hlo.Array) -> float:
    """Counts multiply-adds with the image but not with its padding, as XLA does.

    On TPU, matrix products appear as convolutions whose window is mostly padding.
    """
    of_image, of_kernel, of_result = re.split('_|->', i.attribute('dim_labels'))
    window = dict(re.findall(r'(\w+)=([\dx_\-]+)', i.attribute('window') or ''))
    pairs = 1
    for axis in sorted(set(of_image) & set('0123456789')):
        sizes = [
            array.dims[labels.index(axis)]
            for array, labels in ((image, of_image), (i.arrays[0], of_result), (kernel, of_kernel))
        ]
        settings = {'stride': 1, 'pad': 0, 'lhs_dilate': 1, 'rhs_dilate': 1}
        for key in settings.keys() & window.keys():
            # The low end of the padding, 'low_high'.
            settings[key] = int(window[key].split('x')[int(axis)].split('_')[0])
        pairs *= _window_pairs(*sizes, **settings)
    batch = image.dims[of_image.index('b')] // int(i.attribute('batch_group_count') or 1)
    features = image.dims[of_image.index('f')] // int(i.attribute('feature_group_count') or 1)
    return 2.0 * batch * features * kernel.dims[of_kernel.index('o')] * pairs


@functools.cache
def _window_pairs(
    size: int, out: int, width: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """Counts (output, kernel) positions along one axis that meet an element of the image."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(width) * rhs_dilate
    return int(((at >= 0) & (at < size * lhs_dilate) & (at % lhs_dilate == 0)).sum())
