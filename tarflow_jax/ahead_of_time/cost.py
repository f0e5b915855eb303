"""Computes the cost of a compiled TPU program per device: FLOPs, HBM bytes, collectives, seconds.

The costs come from the optimized, scheduled HLO text. A loop's body counts once per iteration.
"""

import collections
import dataclasses
from collections.abc import Callable

from tarflow_jax.ahead_of_time import hlo
from tarflow_jax.ahead_of_time.chips import Chip, Slice
from tarflow_jax.ahead_of_time.counting import FREE, Counter, KernelCost, Work

QUEUES = ('hbm', 'ici', 'dcn')  # HBM copies, the interconnect, the datacenter network

# The trip count of a loop, from the `while` and the count found in the program (None if not found).
TripCount = Callable[[hlo.Instruction, int | None], int]


@dataclasses.dataclass(frozen=True)
class Line:
    """An instruction in the schedule: how often it runs, and its work and time per run.

    Args:
      seconds: time that it adds to the program; it includes `waited`, the time waiting for a
        network.
    """

    instruction: hlo.Instruction
    times: int
    work: Work
    seconds: float
    waited: float
    op_name: str


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs of one run of a program on one device.

    Args:
      lines: every instruction with a cost, in the order of the schedule.
      chip: the chip it runs on.
      predicted_seconds: time of the schedule, with each instruction at the roofline.
      compiler_seconds: time of the schedule, with each instruction at the larger of the roofline
        and the compiler's estimate. The compiler knows the vector unit and the padding of the MXU;
        the roofline does not.
    """

    lines: tuple[Line, ...]
    chip: Chip
    predicted_seconds: float
    compiler_seconds: float

    def total(self, field: str) -> float:
        """Sums a field of Work over the run: 'flops', 'mxu_flops', 'hbm_bytes', ..."""
        return sum(line.times * getattr(line.work, field) for line in self.lines)

    @property
    def compute_seconds(self) -> float:
        return self.total('mxu_flops') / self.chip.bf16_flops

    @property
    def memory_seconds(self) -> float:
        return self.total('hbm_bytes') / self.chip.hbm_bandwidth

    @property
    def interconnect_seconds(self) -> float:
        return self._network_seconds('ici')

    @property
    def dcn_seconds(self) -> float:
        """The busy time of the datacenter network between slices."""
        return self._network_seconds('dcn')

    def _network_seconds(self, network: str) -> float:
        moved = ((line.times, line.work.collective) for line in self.collectives)
        return sum(times * c.seconds for times, c in moved if c.network == network)

    @property
    def exposed_seconds(self) -> float:
        """The time that the program waits for networks."""
        return sum(line.times * line.waited for line in self.lines)

    @property
    def dcn_exposed_seconds(self) -> float:
        """The time that the program waits for other slices."""
        return sum(
            line.times * line.waited for line in self.lines
            if line.instruction.opcode in ('send-done', 'recv-done')
        )

    @property
    def collectives(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if line.work.collective)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Returns collectives by kind: their number per run and their bytes (see Collective)."""
        table = {}
        for line in self.collectives:
            moved = line.work.collective
            count, size = table.get(moved.kind, (0, 0))
            table[moved.kind] = (count + line.times, size + line.times * moved.num_bytes)
        return table

    def largest_moved(self) -> Line | None:
        """Returns the collective with the largest single array; None without collectives."""
        size = lambda line: line.work.collective.largest.bytes  # noqa: E731
        return max(self.collectives, key=size, default=None)

    def uncounted_kernels(self) -> dict[str, int]:
        """Returns kernels without a known FLOP count, and how often each runs. Bytes do count."""
        names = collections.Counter()
        for line in self.lines:
            if line.work.uncounted:
                names[line.op_name or line.instruction.name] += line.times
        return dict(names)


def analyse(
    text: str,
    where: Slice,
    *,
    trip_count: TripCount | None = None,
    kernel_cost: KernelCost | None = None,
) -> Costs:
    """Computes the costs of a program from the text of its optimized, scheduled HLO.

    Raises:
      ValueError: if a loop has an unknown trip count and `trip_count` gives none, or if the slice
        is too small for the program.
    """
    module = hlo.parse(text)
    if module.num_devices > len(where.places):
        raise ValueError(
            f'The program needs {module.num_devices} devices, but the slice has '
            f'{len(where.places)}.'
        )
    counter = Counter(module, where, kernel_cost)
    walks = [_Walk(counter, trip_count or _known, estimates) for estimates in (False, True)]
    main = module.computations[module.entry]
    (clock, lines), (compiler, _) = (walk.run(main, 1, {}) for walk in walks)
    return Costs(tuple(lines), where.chip, clock.seconds, compiler.seconds)


def joined(parts: list[tuple[int, Costs]]) -> Costs:
    """Returns the total costs of programs that run one after another, each `count` times."""
    return Costs(
        tuple(
            dataclasses.replace(line, times=times * line.times)
            for times, costs in parts for line in costs.lines
        ),
        parts[0][1].chip,
        sum(times * costs.predicted_seconds for times, costs in parts),
        sum(times * costs.compiler_seconds for times, costs in parts),
    )


def _known(loop: hlo.Instruction, count: int | None) -> int:
    if count is None:
        raise ValueError(
            f'The trip count of {loop.name} ({loop.op_name}) is unknown; pass trip_count.'
        )
    return count


@dataclasses.dataclass
class _Clock:
    """The time, and the queues that work in parallel to the core: HBM copies and two networks.

    Queues hold seconds of work and are served in order. Copies get the HBM bandwidth that the core
    does not use.
    """

    seconds: float = 0.0
    queued: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(QUEUES, 0.0))
    served: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(QUEUES, 0.0))
    busy: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(QUEUES, 0.0))

    def advance(self, seconds: float, **uses: float) -> None:
        """Advances the time; `uses` is the time for which the core itself occupies a queue."""
        self.seconds += seconds
        for queue in QUEUES:
            used = uses.get(queue, 0.0)
            self.busy[queue] += used
            done = self.served[queue] + max(0.0, seconds - used)
            self.served[queue] = min(self.queued[queue], done)

    def start(self, queue: str, seconds: float) -> float:
        """Queues work and returns the mark at which it is done."""
        self.queued[queue] += seconds
        self.busy[queue] += seconds
        return self.queued[queue]

    def wait(self, queue: str, mark: float) -> float:
        seconds = max(0.0, mark - self.served[queue])
        self.advance(seconds)
        return seconds


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Walks the schedule. With `compiler`, uses the compiler's estimates too."""

    counter: Counter
    trip_count: TripCount
    compiler: bool

    def run(
        self, computation: hlo.Computation, times: int, known: dict[int, int]
    ) -> tuple[_Clock, list[Line]]:
        """Walks a computation that runs `times` in total; `known` is as in hlo.trip_count."""
        clock, lines, marks = _Clock(), [], {}
        module = self.counter.module
        for i in computation.instructions:
            if i.opcode == 'while':
                count, fixed = hlo.trip_count(module, computation, i, known)
                count = self.trip_count(i, count)
                for part in ('condition', 'body'):
                    inner = module.computations[i.attribute(part).strip('%')]
                    self._nested(clock, lines, [self.run(inner, times * count, fixed)], count)
            elif i.opcode in ('conditional', 'call'):
                called = [module.computations[name] for name in i.computations()]
                self._nested(clock, lines, [self.run(inner, times, {}) for inner in called], 1)
            elif self.counter.role(i) == 'done':
                queue, mark = marks.pop(self.counter.started(computation, i), ('hbm', 0.0))
                seconds = clock.wait(queue, mark)
                waited = seconds if queue != 'hbm' else 0.0
                lines.append(Line(i, times, Work(), seconds, waited, _op_name(computation, i)))
            elif i.opcode not in FREE and not i.opcode.endswith('-update'):
                self._instruction(clock, lines, marks, computation, i, times)
        return clock, lines

    def _nested(self, clock, lines, runs, count: int) -> None:
        """Adds `count` runs of the slowest of several computations."""
        inner, inner_lines = max(runs, key=lambda run: run[0].seconds)
        busy = {queue: count * seconds for queue, seconds in inner.busy.items()}
        clock.advance(count * inner.seconds, **busy)
        lines += inner_lines

    def _instruction(self, clock, lines, marks, computation, i, times: int) -> None:
        work = self.counter.work(computation, i)
        rates = self.counter.where.chip
        hbm = work.hbm_bytes / rates.hbm_bandwidth
        busy = max(work.mxu_flops / rates.bf16_flops, hbm)
        busy = max(busy, work.compiler_seconds) if self.compiler else busy
        ici = work.collective.seconds if work.collective else 0.0
        if self.counter.role(i) == 'start':
            queue = work.collective.network if work.collective else 'hbm'
            marks[i.name] = (queue, clock.start(queue, ici if work.collective else hbm))
            seconds, waited = work.mxu_flops / rates.bf16_flops, 0.0
            clock.advance(seconds)
        else:
            seconds, waited = max(busy, ici), max(0.0, ici - busy)
            clock.advance(seconds, hbm=hbm, ici=ici)
        lines.append(Line(i, times, work, seconds, waited, _op_name(computation, i)))


def _op_name(computation: hlo.Computation, i: hlo.Instruction) -> str:
    """Returns the op_name of an instruction, or of the array that it copies."""
    while not i.op_name and i.operands:
        i = computation.by_name[i.operands[0]]
    return i.op_name
