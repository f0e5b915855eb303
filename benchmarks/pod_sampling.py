"""Predicts the time of 50,000 samples on a pod: `python benchmarks/pod_sampling.py`.

Like `--mode=compile` does for one step, it compiles programs for TPUs without having any (`pip
install -e '.[tpu]'`) and uses the roofline of the chip. The flow is configs/imagenet64.py:cond,
guided (two rows per image), in bfloat16, with several batch sizes per chip and schedules. It prints
one line of JSON for each, and a table.

A schedule tells how to invert each block, in the order of sampling: `s` sequentially, `1x10` with
10 iterations over the whole sequence (Jacobi), `8x256` with 256 iterations over windows of an 8th
of it. The literature (GS-Jacobi, arXiv 2505.12849) writes 8-32-10 for 8 segments of at most 32
iterations in the one hard block, and 10 iterations over the whole sequence in every other block.

Seconds are per image of full batches; the last batch of 50,000 images may not be full. All chips
iterate as often as the slowest image needs. Denoising and writing files are left out, because their
cost does not depend on the schedule.
"""

import argparse
import collections
import dataclasses
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tarflow_jax import config as configs
from tarflow_jax.ahead_of_time import cost, programs, topology
from tarflow_jax.ahead_of_time.chips import GIB, out_of_memory
from tarflow_jax.flow import decoder
from tarflow_jax.flow.condition import Condition
from tarflow_jax.sampling.parallel import solve_block
from tarflow_jax.sampling.schedule import guidance_params
from tarflow_jax.training import sharding
from tarflow_jax.training.state import abstract_state

CONFIG = Path(__file__).parent.parent / 'configs/imagenet64.py'
IMAGES = 50_000
SCHEDULES = {
    'sequential': 's,' * 8,
    '8-32-10': '8x256,' + '1x10,' * 7,
    'hard block sequential, 10': 's,' + '1x10,' * 7,
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The inversion of one block, on one chip.

    Args:
      parts: seconds of attention (which reads keys and values), of the other matrix products (which
        read weights), of waiting for copies between HBM and on-chip memory, of waiting for the
        interconnect, and of elementwise work.
      in_hbm: seconds in which HBM limits the core, not arithmetic.
    """

    seconds: float
    parts: dict[str, float]
    in_hbm: float


def lowered(plan, mesh, batch_size: int, segments: int):
    """Lowers the program that inverts a block, sequentially (0 segments) or in parallel."""
    model = plan.model
    split = sharding.batch_sharding(mesh)
    z = jax.ShapeDtypeStruct((batch_size, *model.token_shape), jnp.float32, sharding=split)
    condition = Condition(labels=jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=split))
    params = parameters(plan, mesh)['block_0']
    guidance = jax.eval_shape(lambda: guidance_params(model, 0, plan.guidance))
    block, rest = model.block(0), (condition, model.block_orders()[0], guidance)
    if segments:
        return solve_block.lower(
            block, segments, z, params, *rest, np.float32(1e-3), np.int32(1024)
        )
    return decoder.invert.lower(block, z, params, *rest)


def parameters(plan, mesh):
    return sharding.placed(abstract_state(plan.model, optax.identity(), ema=False).params, mesh)


def compiled(plan, mesh, batch_size: int, segments: int) -> tuple[str | None, int]:
    """Returns the program's text (None if it does not fit) and its HBM bytes without parameters."""
    try:
        found = lowered(plan, mesh, batch_size, segments).compile()
    except jax.errors.JaxRuntimeError as error:
        needed = out_of_memory(str(error))
        if needed is None:
            raise
        return None, needed[0]
    memory = found.memory_analysis()
    return found.as_text(), memory.temp_size_in_bytes + memory.output_size_in_bytes


def block_cost(text: str, where, iterations: int) -> Cost:
    """Computes the cost of a program whose only loop of unknown length runs `iterations` times."""
    costs = cost.analyse(
        text, where, kernel_cost=programs.splash_cost,
        trip_count=lambda loop, known: iterations if known is None else known,
    )
    chip, parts, in_hbm = where.chip, collections.Counter(), 0.0
    for line in costs.lines:
        part = 'products' if line.work.flops else 'elementwise'
        part = 'attention' if '/attention/' in line.op_name else part
        if line.instruction.opcode.endswith('-done'):
            part = 'copies'
        part = 'interconnect' if line.waited else part
        parts[part] += line.times * line.seconds
        memory = line.work.hbm_bytes / chip.hbm_bandwidth
        if part == 'copies' or memory > line.work.mxu_flops / chip.bf16_flops:
            in_hbm += line.times * line.seconds
    return Cost(costs.predicted_seconds, dict(parts), in_hbm)


def parsed(schedule: str) -> list[tuple[int, int]]:
    """Returns (segments, iterations) of each block; (0, 0) is sequential."""
    blocks = [block for block in schedule.split(',') if block]
    return [(0, 0) if b == 's' else tuple(map(int, b.split('x'))) for b in blocks]


def predict(name, blocks, found: dict, batch: int, chips: int, resident: int, where) -> dict:
    """Computes one row; `found` has (text, bytes) by segments."""
    used = {segments for segments, _ in blocks}
    size = resident + max(found[segments][1] for segments in used)
    row = {
        'batch_per_chip': batch, 'schedule': name, 'hbm_gib': round(size / GIB, 2),
        'fits': bool(size <= where.chip.usable_hbm_bytes) and all(found[s][0] for s in used),
    }
    if not all(found[segments][0] for segments in used):
        return row
    counts = collections.Counter(blocks)
    costs = {b: block_cost(found[b[0]][0], where, b[1]) for b in counts}
    total = sum(times * costs[b].seconds for b, times in counts.items())
    parts = collections.Counter()
    for b, times in counts.items():
        for part, seconds in costs[b].parts.items():
            parts[part] += times * seconds
    in_hbm = sum(times * costs[b].in_hbm for b, times in counts.items())
    return row | {
        'seconds': round(total / (batch * chips) * IMAGES, 2),
        'batch_seconds': round(total, 4),
        'shares': {part: round(seconds / total, 3) for part, seconds in parts.most_common()},
        'share_bound_by_hbm': round(in_hbm / total, 3),
    }


def table(rows: list[dict]) -> list[str]:
    head = f'{"batch":>5}  {"schedule":<28} {"GiB":>6} {"s / 50,000":>10}  where the time goes'
    lines = [head]
    for row in rows:
        seconds = f'{row["seconds"]:10.1f}' if 'seconds' in row else f'{"-":>10}'
        shares = ', '.join(f'{part} {share:.0%}' for part, share in row.get('shares', {}).items())
        bound = f'; HBM bound {row["share_bound_by_hbm"]:.0%}' if 'seconds' in row else ''
        fits = '' if row['fits'] else 'DOES NOT FIT; '
        lines.append(
            f'{row["batch_per_chip"]:>5}  {row["schedule"]:<28} {row["hbm_gib"]:>6.2f} {seconds}  '
            f'{fits}{shares}{bound}'
        )
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--topology', default='v5e:16x16')
    parser.add_argument('--batches', default='1,16,64,256', help='per chip')
    parser.add_argument('--fsdp', type=int, default=1, help='chips that share the parameters')
    parser.add_argument('--tensor', type=int, default=1, help='chips that share heads and channels')
    parser.add_argument('--schedule', action='append', default=[], metavar='NAME=s,1x10,...')
    args = parser.parse_args()
    schedules = SCHEDULES | dict(given.split('=') for given in args.schedule)
    schedules = {name: parsed(blocks) for name, blocks in schedules.items()}

    slice_ = topology.describe(args.topology)
    mesh = sharding.make_mesh(fsdp=args.fsdp, tensor=args.tensor, devices=slice_.devices)
    config = runpy.run_path(str(CONFIG))['get_config']('cond')
    plan = configs.plan(config).on(sharding.Layout(mesh, config.model.attention))
    resident = sum(
        4 * np.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(parameters(plan, mesh))
    )
    rows = []
    for batch in map(int, args.batches.split(',')):
        segments = sorted({segments for blocks in schedules.values() for segments, _ in blocks})
        found = {s: compiled(plan, mesh, batch * slice_.chips, s) for s in segments}
        for name, blocks in schedules.items():
            rows.append(predict(
                name, blocks, found, batch, slice_.chips, resident, slice_.where(mesh)
            ))
            print(json.dumps(rows[-1]), flush=True)
    print(*table(rows), sep='\n')


if __name__ == '__main__':
    main()
