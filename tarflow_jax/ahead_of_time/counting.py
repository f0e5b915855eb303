"""What single instructions of a TPU program do: FLOPs, bytes, collectives.

Bytes follow XLA's own HloCostAnalysis (a fusion that reads an array only in slices reads the
slices; one that updates a slice in place touches the slice), except that only HBM counts, not
VMEM, that an asynchronous copy counts once and not at its start and end both, and that padding
counts.
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

# (flops, flops with MXU padding, HBM bytes) of a Pallas kernel call; None for what it says itself.
KernelCost = Callable[[hlo.Instruction], tuple[float, float, float] | None]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective.

    Args:
      num_bytes: of one device: the arrays reduced, exchanged or permuted; of an all-gather the
        gathered, of a reduce-scatter the unscattered ones.
      groups: of devices by partition number; of a permutation (source, target) pairs.
      largest: the largest array among those that it takes in or gives out.
      seconds: by itself, on an idle network.
      network: 'ici', or 'dcn' for one between slices.
    """

    kind: str
    num_bytes: int
    groups: tuple[tuple[int, ...], ...]
    largest: hlo.Array
    seconds: float
    network: str = 'ici'


@dataclasses.dataclass(frozen=True)
class Work:
    """What one instruction does each time.

    Args:
      flops: of matrix products and convolutions, 2 per multiply-add, and of kernels that tell.
      mxu_flops: the same times the passes that the MXU takes: a float32 product with precision
        'highest' takes 6, with 'high' 3.
      hbm_bytes: read and written.
      compiler_seconds: the compiler's own estimate; 0 where it gives none.
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
        """'start' or 'done' of something asynchronous, 'step' of a collective amid other work.

        TPU programs start and finish some collectives in fusions, and carry them on in fusions that
        mostly compute; all of these contain the same collective, marked with a chain_id.
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
        """The name of the instruction that started what `done` waits for."""
        i = computation.by_name[done.operands[0]]
        if i.opcode == 'recv':  # of what is sent at the same rendezvous
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
                elif source.opcode == 'while':  # carried around a loop that does not wait for it
                    begin = computation.by_name[source.operands[0]]
                    if begin.opcode == 'tuple':
                        operand, i = int(i.attribute('index')), begin
            i = computation.by_name[i.operands[operand]]
        return i.name

    # FLOPs

    def _flops(self, computation: hlo.Computation, i: hlo.Instruction) -> tuple[float, float]:
        """Multiply-adds times 2, and that times MXU passes, of an instruction and its callees."""
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
        """The instructions of the computations that an instruction calls."""
        for name in i.computations():
            callee = self.module.computations[name]
            for inner in callee.instructions:
                yield callee, inner

    # Bytes

    def moved(self, computation: hlo.Computation, i: hlo.Instruction) -> list[tuple[int, float]]:
        """What an instruction reads and writes: (memory space, bytes) each."""
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
            if role == 'start':  # its first result is its operand, handed on
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
        """Bytes of a fusion's parameter that the fusion reads; None for all."""
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
        """The collective that an instruction is, or that its fusion contains."""
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
    """Whether a fused all-reduce is only used in slices."""
    users = computation.users[name]
    return bool(users) and all(
        user.opcode == 'dynamic-slice'
        or user.opcode in _SAME_ELEMENTS
        and _scatters(computation, user.name)
        for user in users
    )


def _between_slices(i: hlo.Instruction, opcode: str = 'send') -> str | None:
    """The rendezvous of what goes between slices through the host; None for anything else."""
    if i.opcode != opcode or '_xla_megascale_transfer_type' not in i.attributes:
        return None
    return _attribute_of_slices(i, '_host_transfer_rendezvous')


def _attribute_of_slices(i: hlo.Instruction, name: str) -> str:
    found = re.search(rf'_xla{name}="([^"]*)"', i.attributes)
    return found[1] if found else ''


def _is_piece(i: hlo.Instruction) -> bool:
    """Whether it is one of the fused pieces of an asynchronous collective."""
    return i.opcode in COLLECTIVES and 'chain_id=' in i.attributes


def _done(computation: hlo.Computation, start: hlo.Instruction) -> hlo.Instruction:
    for user in computation.users[start.name]:
        if user.opcode.endswith('-done'):
            return user
        if user.opcode.endswith('-update'):
            return _done(computation, user)
    raise ValueError(f'{start.name} is never waited for.')


def _written(computation: hlo.Computation, name: str) -> float | None:
    """Bytes that a fusion's result writes if it updates a slice in place; None for all."""
    i = computation.by_name[name]
    while i.opcode == 'bitcast':
        i = computation.by_name[i.operands[0]]
    if i.opcode == 'parameter' or _is_piece(i):
        return 0.0
    if i.opcode != 'dynamic-update-slice':
        return None
    return computation.by_name[i.operands[1]].arrays[0].padded_bytes


def _cost_estimate(kernel: hlo.Instruction) -> tuple[float, float, float] | None:
    """What `pallas_call(cost_estimate=...)` left in the program."""
    estimate = kernel.backend_config.get('custom_call_config', {}).get('cost_estimate')
    if not estimate:
        return None
    flops = float(estimate['flops'])
    return flops, flops, float(estimate['bytes_accessed'])


def _passes(i: hlo.Instruction, dtypes: list[str]) -> int:
    """How often the MXU, which multiplies bfloat16, goes over the operands."""
    algorithm = i.attribute('algorithm') or ''
    if found := re.search(r'_x(\d)$', algorithm):
        return int(found.group(1))
    wide = sum(dtype in ('f32', 'f64') for dtype in dtypes)
    if not wide:
        return 1
    precision = re.findall(r'\w+', i.attribute('operand_precision') or '')
    if 'highest' in precision or algorithm == 'dot_f32_f32_f32':
        return 6 if wide == 2 else 3  # float32 is a sum of three bfloat16, low products left out
    return (3 if wide == 2 else 2) if 'high' in precision else 1


def _dot_flops(dot: hlo.Instruction, left: hlo.Array, right: hlo.Array) -> float:
    contracted = re.findall(r'\d+', dot.attribute('lhs_contracting_dims') or '')
    return 2.0 * math.prod(dot.arrays[0].dims) * math.prod(left.dims[int(d)] for d in contracted)


def _convolution_flops(i: hlo.Instruction, image: hlo.Array, kernel: hlo.Array) -> float:
    """Multiply-adds with the image, not with its padding, as XLA counts: matrix products appear on
    TPU as convolutions whose window is mostly padding."""
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
            # Of padding, 'low_high', the low end.
            settings[key] = int(window[key].split('x')[int(axis)].split('_')[0])
        pairs *= _window_pairs(*sizes, **settings)
    batch = image.dims[of_image.index('b')] // int(i.attribute('batch_group_count') or 1)
    features = image.dims[of_image.index('f')] // int(i.attribute('feature_group_count') or 1)
    return 2.0 * batch * features * kernel.dims[of_kernel.index('o')] * pairs


@functools.cache
def _window_pairs(
    size: int, out: int, width: int, *, stride: int, pad: int, lhs_dilate: int, rhs_dilate: int
) -> int:
    """(output, kernel) positions along one axis that meet an element of the image."""
    at = np.arange(out)[:, None] * stride - pad + np.arange(width) * rhs_dilate
    return int(((at >= 0) & (at < size * lhs_dilate) & (at % lhs_dilate == 0)).sum())
