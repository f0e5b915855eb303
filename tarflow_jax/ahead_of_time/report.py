"""Compiles a step for a TPU slice on any machine, and reports memory and time."""

import logging
import time
from pathlib import Path

import jax

from tarflow_jax import config as configs
from tarflow_jax import files
from tarflow_jax.ahead_of_time import cost, programs
from tarflow_jax.ahead_of_time.chips import CHIPS, measured_range, out_of_memory
from tarflow_jax.ahead_of_time.topology import Topology
from tarflow_jax.training import memory, sharding

GIB = 2**30

log = logging.getLogger(__name__)


def planned(config, topology: Topology, program: str):
    """Returns the plan on its mesh, the mesh and the step for compile_for; compiles nothing.

    Raises:
      ValueError: if the config does not fit the slice.
    """
    mesh = configs.named('mesh', sharding.make_mesh, **config.mesh, devices=topology.devices)
    plan = configs.plan(config)
    _check_size(plan.model, topology, program)
    plan = plan.on(sharding.Layout(mesh, config.model.attention))
    return plan, mesh, programs.PROGRAMS[program](config, plan, mesh)


def _check_size(model, topology: Topology, program: str) -> None:
    """Raises ValueError if the flow exceeds the memory of all chips; XLA would take minutes."""
    needed = 4 * memory.parameter_count(model) * (4 if program == 'train' else 1)
    there = topology.chips * CHIPS[topology.chip].hbm_bytes
    if needed > there:
        raise ValueError(
            f'a flow of {memory.parameter_count(model):,} parameters (model.width '
            f'{model.width}, {sum(model.layers_per_block)} layers) needs at least '
            f'{memory.in_gib(needed)} for --program={program}, but all chips of {topology.name} '
            f'together have {memory.in_gib(int(there))}; choose a smaller flow or more chips.'
        )


def compile_for(config, topology: Topology, program: str, save_to: Path | None = None) -> dict:
    """Compiles a step of the config for the topology and reports its cost.

    Args:
      config: a config of `tarflow_jax.config.default`, with `mesh` and batch size for the slice.
      program: one of programs.PROGRAMS.
      save_to: folder for the text of the compiled programs.
    Returns:
      JSON values; sizes in bytes and times in seconds, per device (for TPU7x, half a chip) and
        step; see docs/pods.md.
    Raises:
      ValueError: as for `planned`.
    """
    plan, mesh, step = planned(config, topology, program)
    chip, devices = CHIPS[topology.chip], len(topology.devices)
    measured, measured_on = measured_range(topology.chip)
    row = {
        'topology': topology.name,
        'program': program,
        'chips': topology.chips,
        'devices': devices,
        'slices': topology.slices,
        'mesh': dict(mesh.shape),
        'batch_size': step.batch_size,
        'remat': config.model.remat,
        'attention': plan.model.layout.kernel(plan.model.dtype, plan.model.token_shape[0]),
        'parameters': _size(getattr(step.resident, 'params', step.resident), sharded=False) // 4,
        'parameter_bytes': _size(getattr(step.resident, 'params', step.resident)),
        'model_flops': step.model_flops / devices,
        'cache_bytes': step.cache_bytes / devices,
        'hbm_capacity_bytes': chip.hbm_bytes,
        'hbm_usable_bytes': chip.usable_hbm_bytes,
        'measured_over_predicted': measured,
        'measured_on': measured_on,
        'compile_seconds': 0.0,
    }
    parts, memory, row['programs'] = [], [], []
    for part in step.programs:
        start = time.perf_counter()
        try:
            compiled = part.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            needed = out_of_memory(str(error))
            if needed is None:
                raise
            return row | {
                'fits': False, 'hbm_total_bytes': needed[0], 'does_not_fit': part.name,
                'predicted_step_seconds': None, 'predicted_mfu': None,
            }
        row['compile_seconds'] += time.perf_counter() - start
        text = compiled.as_text()
        if save_to:
            name = f'{topology.name}_{part.name}'.replace(':', '_').replace(' ', '_')
            files.write_text(save_to / f'{name}.hlo.txt', text)
        costs = cost.analyse(text, topology.where(mesh), kernel_cost=programs.splash_cost)
        parts.append((part.times, costs))
        memory.append(compiled.memory_analysis())
        row['programs'].append({
            'name': part.name, 'times': part.times, 'seconds': costs.predicted_seconds,
            'temporary_bytes': memory[-1].temp_size_in_bytes,
        })
    return row | _memory(step, memory, chip) | _time(cost.joined(parts), row['model_flops'])


def _size(tree, sharded: bool = True) -> int:
    """Returns the bytes of the arrays: one device's part, or in total."""
    shape = lambda x: x.sharding.shard_shape(x.shape) if sharded else x.shape  # noqa: E731
    return sum(
        jax.ShapeDtypeStruct(shape(x), x.dtype).size * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _memory(step, memory, chip) -> dict:
    """Returns HBM use by kind, for the largest program together with the resident arrays."""
    kinds = [
        {
            'arguments': max(m.argument_size_in_bytes, _size(step.resident)),
            'temporaries': m.temp_size_in_bytes,
            'output': m.output_size_in_bytes - m.alias_size_in_bytes,
            'code': m.generated_code_size_in_bytes,
        }
        for m in memory
    ]
    largest = max(kinds, key=lambda kind: sum(kind.values()))
    total = sum(largest.values())
    return {
        'hbm_bytes': largest, 'hbm_total_bytes': total, 'fits': total <= chip.usable_hbm_bytes
    }


def _time(costs: cost.Costs, model_flops: float) -> dict:
    collectives, largest = costs.by_kind(), costs.largest_moved()
    attention = sum(
        line.times * line.work.hbm_bytes for line in costs.lines if '/attention/' in line.op_name
    )
    return {
        'flops': costs.total('flops'),
        'hbm_traffic_bytes': costs.total('hbm_bytes'),
        'attention_traffic_share': attention / costs.total('hbm_bytes'),
        'collectives': {k: {'count': n, 'bytes': size} for k, (n, size) in collectives.items()},
        'collective_bytes': sum(size for _, size in collectives.values()),
        'largest_array_moved': largest and {
            'shape': list(largest.work.collective.largest.dims), 'op': largest.op_name
        },
        'compute_seconds': costs.compute_seconds,
        'memory_seconds': costs.memory_seconds,
        'interconnect_seconds': costs.interconnect_seconds,
        'exposed_interconnect_seconds': costs.exposed_seconds - costs.dcn_exposed_seconds,
        'dcn_bandwidth': costs.chip.dcn_bandwidth,
        'dcn_seconds': costs.dcn_seconds,
        'exposed_dcn_seconds': costs.dcn_exposed_seconds,
        'predicted_step_seconds': costs.predicted_seconds,
        'predicted_mfu': model_flops / costs.predicted_seconds / costs.chip.bf16_flops,
        'compiler_step_seconds': costs.compiler_seconds,
        'uncounted_kernels': list(costs.uncounted_kernels()),
    }


def smallest_change(config, topology: Topology, program: str) -> dict | None:
    """Returns the first of several changes with which the step fits.

    It first saves less for the backward pass, then shards the state over more chips, then reduces
    the batch size.

    Returns:
      the row of `compile_for`, with 'change'; None if no change helps.
    """
    for change in _changes(config, topology, program):
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(change)
        text = ' '.join(f'--config.{field}={value}' for field, value in change.items())
        try:
            row = compile_for(changed, topology, program)
        except ValueError:  # sizes that are not divisible
            continue
        log.info('%s with %s: %s', topology.name, text, 'fits' if row['fits'] else 'does not fit')
        if row['fits']:
            return row | {'change': text}
    return None


def _changes(config, topology: Topology, program: str):
    remat = {}
    if program == 'train' and config.model.remat != 'layer':
        remat = {'model.remat': 'layer'}
        yield remat
    chips = topology.chips // topology.slices // max(config.mesh.tensor, 1)
    fsdp = config.mesh.fsdp
    while 1 <= fsdp * 4 <= chips:
        fsdp *= 4
        yield {**remat, 'mesh.data': -1, 'mesh.fsdp': fsdp}
    split = {'mesh.data': -1, 'mesh.fsdp': fsdp} if fsdp > config.mesh.fsdp else {}
    size = config[program].batch_size
    for part in (2, 4, 8):
        if size % part == 0:
            yield {**remat, **split, f'{program}.batch_size': size // part}


def lines(row: dict) -> list[str]:
    """Returns the printed lines of one row."""
    gib = lambda size: f'{size / GIB:.2f} GiB'  # noqa: E731
    each = 'chip' if row['devices'] == row['chips'] else 'device, of which a chip has two'
    mesh = ' x '.join(f'{axis} {size}' for axis, size in row['mesh'].items() if size > 1) or 'one'
    found = [
        f'{row["topology"]}: {row["program"]}, {row["chips"]} chips as {mesh}, batch '
        f'{row["batch_size"]}, remat {row["remat"]}, attention {row["attention"]}',
        f'  parameters   {row["parameters"]:,}, {gib(row["parameter_bytes"])} per {each}',
    ]
    limit = f'of {gib(row["hbm_usable_bytes"])} usable of {gib(row["hbm_capacity_bytes"])}'
    if not row['fits'] and 'hbm_bytes' not in row:
        return [*found, f'  HBM          DOES NOT FIT: {row["does_not_fit"]} needs '
                        f'{gib(row["hbm_total_bytes"])} {limit}']
    kinds = ', '.join(f'{kind} {gib(size)}' for kind, size in row['hbm_bytes'].items() if size)
    verdict = 'fits' if row['fits'] else 'DOES NOT FIT'
    found += [f'  HBM          {verdict}: {gib(row["hbm_total_bytes"])} {limit} ({kinds})']
    if row['cache_bytes']:
        found += [f'  KV cache     {gib(row["cache_bytes"])} per chip, part of the temporaries']
    found += [
        f'  compute      {row["compute_seconds"]:.4f} s: {row["flops"] / 1e12:.1f} TFLOP, '
        f'{row["model_flops"] / 1e12:.1f} of them for the model',
        f'  memory       {row["memory_seconds"]:.4f} s: {row["hbm_traffic_bytes"] / 1e9:.1f} GB, '
        f'{row["attention_traffic_share"]:.0%} of it for attention',
        f'  interconnect {row["interconnect_seconds"]:.4f} s, of which '
        f'{row["exposed_interconnect_seconds"]:.4f} s exposed',
    ]
    found += [
        f'    {kind:18} {value["count"]:6d} x, {value["bytes"] / 1e6:10.1f} MB'
        for kind, value in row['collectives'].items()
    ]
    if row['slices'] > 1:
        found += [
            f'  datacenter   {row["dcn_seconds"]:.4f} s between slices at '
            f'{row["dcn_bandwidth"] * 8e-9:.0f} Gbit/s per {each.split(",")[0]}, of which '
            f'{row["exposed_dcn_seconds"]:.4f} s exposed'
        ]
    if row['uncounted_kernels']:
        found += [f'  not counted  kernels {", ".join(row["uncounted_kernels"])}']
    found += [
        f'  step         {row["predicted_step_seconds"]:.4f} s predicted, '
        f'{row["predicted_mfu"]:.1%} of the peak '
        f'(compiler\'s estimate {row["compiler_step_seconds"]:.4f} s)',
        '  measured     {:.4f} to {:.4f} s, if the prediction is as accurate as for published '
        'steps on {}: {:.2f} to {:.2f} times'.format(
            *measured_seconds(row), ', '.join(row['measured_on']), *row['measured_over_predicted']
        ),
        f'  compiled in  {row["compile_seconds"]:.1f} s',
    ]
    if len(row['programs']) > 1:
        found += [
            f'    {p["times"]} x {p["name"]:26} {p["seconds"]:.4f} s, temporaries '
            f'{gib(p["temporary_bytes"])}' for p in row['programs']
        ]
    return found


def measured_seconds(row: dict) -> tuple[float, float]:
    """Returns the expected range of the measured step, from the errors for published steps."""
    low, high = row['measured_over_predicted']
    return low * row['predicted_step_seconds'], high * row['predicted_step_seconds']


COLUMNS = (
    ('topology', 14, lambda r: r['topology']),
    ('chips', 5, lambda r: str(r['chips'])),
    ('batch', 6, lambda r: str(r['batch_size'])),
    ('fits', 4, lambda r: 'yes' if r['fits'] else 'NO'),
    ('HBM GiB', 7, lambda r: f'{r["hbm_total_bytes"] / GIB:.2f}'),
    ('of GiB', 6, lambda r: f'{r["hbm_usable_bytes"] / GIB:.2f}'),
    ('coll. MB', 8, lambda r: f'{r["collective_bytes"] / 1e6:.0f}'),
    ('step s', 8, lambda r: f'{r["predicted_step_seconds"]:.4f}'),
    ('measured s', 13, lambda r: '{:.3f}-{:.3f}'.format(*measured_seconds(r))),
    ('MFU', 5, lambda r: f'{r["predicted_mfu"]:.0%}'),
    ('compile s', 9, lambda r: f'{r["compile_seconds"]:.0f}'),
)


def table(rows: list[dict]) -> list[str]:
    """Returns a line of headings and one line per topology."""

    def cell(row, value) -> str:
        try:
            return value(row)
        except (KeyError, TypeError):  # a step that does not fit has no time
            return '-'

    head = '  '.join(f'{name:>{width}}' for name, width, _ in COLUMNS)
    return [head] + [
        '  '.join(f'{cell(row, value):>{width}}' for _, width, value in COLUMNS) for row in rows
    ]
