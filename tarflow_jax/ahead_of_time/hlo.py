"""Parses the text of an optimized, scheduled XLA program (`compiled.as_text()`).

It reads what a cost model needs: computations, instructions in schedule order, array shapes with
TPU tiles and memory spaces, trip counts of loops, and the device groups of collectives. Unlike
`compiled.cost_analysis()`, which counts a loop's body once, it keeps loops separate.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence

import numpy as np

HBM, VMEM = 0, 1  # memory spaces S(n) of a layout; a layout without one is in HBM

_BITS = {'pred': 8, 'token': 0, 'opaque': 0, 'c64': 64, 'c128': 128}
_ARRAY = re.compile(r'([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?')
_HEADER = re.compile(r'(ENTRY\s+)?%?([\w.\-]+)\s*(?:\(.*)?\{\s*$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ([a-z][\w\-]*)\(')
_COMPUTATION = re.compile(
    r'\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations'
    r'|called_computations)=(\{[^}]*\}|%?[\w.\-]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: element type, dimensions, memory space and bytes.

    Args:
      bytes: bytes of the values.
      padded_bytes: bytes including the padding of the layout's first tile, which are the bytes
        actually moved: bf16[8, 12] in tiles of (8, 128) fills 8 x 128.
    """

    dtype: str
    dims: tuple[int, ...]
    space: int
    bytes: int
    padded_bytes: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: its arrays (tuples flattened), operand names, and the attributes as text."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inside: str  # text in the operation's parentheses: a constant's value, a parameter's number
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the value of `name=value`, up to the matching brace or the next comma."""
        found = re.search(rf'(?:^|[ ,]){re.escape(name)}=', self.attributes)
        return _value(self.attributes, found.end()) if found else None

    @functools.cached_property
    def op_name(self) -> str:
        """Returns its place in the JAX program, such as 'jit(f)/block_0/dot_general', or ''."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found.group(1) if found else ''

    @functools.cached_property
    def backend_config(self) -> dict:
        """Returns the compiler's JSON notes on the instruction; {} if there are none."""
        at = self.attributes.find('backend_config={')
        if at < 0:
            return {}
        try:
            return json.JSONDecoder().raw_decode(self.attributes[at + len('backend_config=') :])[0]
        except json.JSONDecodeError:
            return {}

    def computations(self) -> tuple[str, ...]:
        """Returns the names of the computations it calls, in printed order."""
        found = _COMPUTATION.findall(self.attributes)
        return tuple(name.strip(' %') for part in found for name in part.strip('{}').split(','))


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.inside): i for i in self.instructions if i.opcode == 'parameter'}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users = {name: [] for name in self.by_name}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Module:
    """A program for `num_devices` devices (partitions x replicas)."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int


def parse(text: str) -> Module:
    """Parses the module in `compiled.as_text()`. Raises ValueError if it has no ENTRY."""
    computations, entry, name, lines = {}, None, None, []
    # A kernel's metadata may span several lines, which belong to its instruction.
    for line in re.sub(r'\n(?=\"|\}\})', ' ', text).splitlines():
        if name is None:
            header = None if line.startswith((' ', 'HloModule')) else _HEADER.match(line)
            if header:
                name, lines = header.group(2), []
                entry = name if header.group(1) else entry
        elif line.startswith('}'):
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif instruction := _instruction(line):
            lines.append(instruction)
    if entry not in computations:
        raise ValueError('This is not HLO text: it has no complete ENTRY computation.')
    header = text[: text.find('\n')]
    counts = re.findall(r'\b(?:num_partitions|replica_count)=(\d+)', header)
    return Module(computations, entry, math.prod(int(n) for n in counts))


def _instruction(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    opcode = start and _OPCODE.search(line, start.end() - 1)
    if not opcode:
        return None
    inside = _value(line, opcode.end() - 1)[1:-1]
    if '%' in inside:
        operands = re.findall(r'%([\w.\-]+)', inside)
    elif opcode.group(1) in ('constant', 'parameter', 'iota') or not inside:
        operands = []
    else:
        plain = re.sub(r'/\*.*?\*/|[({\[][^(){}\[\]]*[)}\]]', '', inside)
        operands = [part.split()[-1] for part in plain.split(',') if part.strip()]
    return Instruction(
        name=start.group(2),
        opcode=opcode.group(1),
        arrays=arrays(line[start.end() : opcode.start()]),
        operands=tuple(operands),
        inside=inside,
        attributes=line[opcode.end() + len(inside) + 1 :].lstrip(', '),
        is_root=bool(start.group(1)),
    )


def _value(text: str, at: int) -> str:
    """Returns a bracketed value from `at`, or a plain value up to a comma or space."""
    if text[at : at + 1] not in tuple('({['):
        return re.compile(r'[^, ]*').match(text, at).group()
    depth = 0
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\]]').finditer(text, at):
        depth += {'"': 0}.get(found.group()[0], 1 if found.group() in '({[' else -1)
        if not depth:
            return text[at : found.end()]
    return text[at:]


@functools.lru_cache(maxsize=4096)
def arrays(shape: str) -> tuple[Array, ...]:
    """Parses the arrays of a printed shape, flattening tuples: 'f32[8,128]{1,0:T(8,128)S(1)}'."""
    return tuple(_array(*found) for found in _ARRAY.findall(re.sub(r'/\*.*?\*/', '', shape)))


def _array(dtype: str, dims: str, layout: str) -> Array:
    dims = tuple(int(d.strip(' <=')) for d in dims.split(',') if d.strip(' <=?'))
    order, _, notes = layout.partition(':')
    physical = [dims[int(d)] for d in order.split(',')][::-1] if order else list(dims)
    if tile := re.search(r'T\(([^)]*)\)', notes):
        sizes = [int(t) if t.strip('*') else 1 for t in tile.group(1).split(',')]
        physical = [1] * (len(sizes) - len(physical)) + physical
        for i, size in enumerate(sizes, len(physical) - len(sizes)):
            physical[i] = -(-physical[i] // size) * size
    space = re.search(r'S\((\d+)\)', notes)
    digits = re.search(r'\d+', dtype)
    bits = _BITS[dtype] if dtype in _BITS else int(digits.group()) if digits else 32
    return Array(
        dtype=dtype,
        dims=dims,
        space=int(space.group(1)) if space else HBM,
        bytes=-(-math.prod(dims) * bits // 8),
        padded_bytes=-(-math.prod(physical) * bits // 8),
    )


# The devices of a collective.

_IOTA = re.compile(r'\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?')
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{('[^}]*)\}")


def groups(collective: Instruction, num_devices: int) -> tuple[tuple[int, ...], ...]:
    """Returns the device groups of a collective, or (source, target) pairs of a permutation.

    It reads all forms that XLA prints: `{{0,1},{2,3}}`, `{}` for all devices, `[2,8]<=[16]`,
    `[8,2]<=[2,8]T(1,0)`, and `mesh['x'=2,'y'=8], device_ids=([2,8]T(1,0)) {'x'}`.
    """
    text = collective.attributes
    found = re.search(r'\b(?:replica_groups|source_target_pairs)=', text)
    if not found or text.startswith('{}', found.end()):
        return (tuple(range(num_devices)),)
    if text.startswith('{', found.end()):
        lists = re.findall(r'\{([\d,\s]+)\}', _value(text, found.end()))
        return tuple(tuple(int(n) for n in ids.split(',')) for ids in lists)
    if mesh := _MESH.match(text, found.end()):
        return _mesh_groups(*mesh.groups())
    shape, source, order = _IOTA.match(text, found.end()).groups()
    ids = _iota(source or shape, order).reshape(_numbers(shape))
    return tuple(map(tuple, ids.reshape(-1, ids.shape[-1]).tolist()))


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> tuple[tuple[int, ...], ...]:
    """Returns groups along the named axes; `'x':(2)4` is x's minor part of 4, major part 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh)}
    ids = np.arange(math.prod(sizes.values()))
    if device_ids:
        iota = _IOTA.match(device_ids)
        ids = _iota(iota[2] or iota[1], iota[3]) if iota else np.array(_numbers(device_ids))
    inside, coordinates = [], np.unravel_index(np.arange(ids.size), tuple(sizes.values()))
    outside = dict(zip(sizes, coordinates))
    for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", axes):
        before, size = int(before or 1), int(size or sizes[name])
        minor = sizes[name] // before // size
        digit = dict(zip(sizes, coordinates))[name] // minor % size
        outside[name] = outside[name] - digit * minor
        inside.append(digit)
    # Devices with equal coordinates outside the named axes form a group, in order.
    order = np.lexsort([*inside[::-1], *list(outside.values())[::-1]])
    width = math.prod(int(digit.max()) + 1 for digit in inside)
    return tuple(map(tuple, ids.reshape(-1)[order].reshape(-1, width).tolist()))


def _iota(shape: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(',')]


# Trip counts of loops.

Scalar = tuple[int | None, int]  # (i, k) is element i of the loop's state plus k; (None, k) is k


def trip_count(
    module: Module, computation: Computation, loop: Instruction, known: dict[int, int]
) -> tuple[int | None, dict[int, int]]:
    """Returns the trip count of a `while`, and the elements of its state that are known constants.

    It uses `known_trip_count` if XLA provides it. Otherwise it uses the condition, if that compares
    an element of the state, to which the body adds a constant, with another constant.

    Args:
      computation: the computation that contains the loop.
      known: constant integer elements of that computation's own parameter.
    Returns:
      the count, or None if it is unknown; and the constants in the loop's state.
    """
    body, condition = (
        module.computations[loop.attribute(part).strip('%')] for part in ('body', 'condition')
    )
    after = [_scalar(module, body, name) for name in body.root.operands]
    # Elements with a known initial value, to which the body adds a constant: (initial, added).
    moves = {}
    for i, (name, later) in enumerate(zip(_elements(computation, loop), after)):
        first = _scalar(module, computation, name)
        if first and first[0] in (None, *known) and later and later[0] == i:
            moves[i] = (known.get(first[0], 0) + first[1], later[1])
    fixed = {i: begin for i, (begin, added) in moves.items() if not added}
    config = re.search(r'known_trip_count\\?"?:?=?\{\\?"?n\\?"?:\\?"?(\d+)', loop.attributes)
    if config:
        return int(config.group(1)), fixed
    test = _comparison(module, condition)
    if test is None:
        return None, fixed
    left, direction, right = test
    moves[None] = (0, 0)  # for constants
    if left[0] not in moves or right[0] not in moves:
        return None, fixed
    (begin, added), (bound, raised) = moves[left[0]], moves[right[0]]
    return _count(bound + right[1] - begin - left[1], added - raised, direction), fixed


def _count(distance: int, step: int, direction: str) -> int | None:
    """Counts how often a test passes if its sides start `distance` apart and approach by `step`."""
    if direction in ('GT', 'GE'):
        distance, step = -distance, -step
    if direction == 'NE':
        return distance // step if step and distance % step == 0 and distance // step >= 0 else None
    if direction not in ('LT', 'LE', 'GT', 'GE') or step <= 0:
        return None
    return max(0, -(-(distance + (direction in ('LE', 'GE'))) // step))


def _elements(computation: Computation, loop: Instruction) -> Sequence[str]:
    state = computation.by_name[loop.operands[0]]
    return state.operands if state.opcode == 'tuple' else ()


def _comparison(module: Module, condition: Computation) -> tuple[Scalar, str, Scalar] | None:
    """Returns the condition's test as (left, direction, right), also in a fusion; else None."""
    inner, arguments = condition, None
    if inner.root.opcode == 'fusion':
        arguments = [_scalar(module, condition, name) for name in inner.root.operands]
        inner = module.computations[inner.root.computations()[0]]
    if inner.root.opcode != 'compare':
        return None
    left, right = (_scalar(module, inner, name, arguments) for name in inner.root.operands)
    return (left, inner.root.attribute('direction'), right) if left and right else None


def _scalar(
    module: Module, computation: Computation, name: str, arguments: list | None = None
) -> Scalar | None:
    """Expresses an integer as an element of the loop's state plus a constant.

    `arguments` are the operands, if it is inside a fusion.
    """
    here = functools.partial(_scalar, module, computation, arguments=arguments)
    i = computation.by_name.get(name)
    if i is None:
        return None
    if i.opcode == 'constant' and re.fullmatch(r'-?\d+', i.inside.strip()):
        return (None, int(i.inside))
    if i.opcode == 'parameter' and arguments is not None:
        return arguments[int(i.inside)]
    if i.opcode in ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start'):
        return here(i.operands[0])
    if i.opcode == 'get-tuple-element':
        index, source = int(i.attribute('index')), computation.by_name[i.operands[0]]
        if source.opcode == 'parameter' and arguments is None:
            return (index, 0)
        return here(source.operands[index]) if source.opcode == 'tuple' else None
    if i.opcode in ('add', 'subtract'):
        left, right = map(here, i.operands)
        if left and right and i.opcode == 'subtract' and right[0] is None:
            return (left[0], left[1] - right[1])
        if left and right and i.opcode == 'add' and None in (left[0], right[0]):
            return (right[0] if left[0] is None else left[0], left[1] + right[1])
    if i.opcode == 'fusion':
        callee = module.computations[i.computations()[0]]
        return _scalar(module, callee, callee.root.name, [here(name) for name in i.operands])
    return None
