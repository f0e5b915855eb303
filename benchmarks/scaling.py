"""Plots how cost grows with each size of a flow: `python benchmarks/scaling.py --plot=scaling.png`.

Starting from one small flow, it varies one number at a time: image size, patch size, width, blocks,
layers per block, batch, devices. For each value it measures the seconds of a train step and of
sequential sampling, in float32 on a CPU, as the median of a few runs; the values of a number
alternate. It prints one line of JSON per value, and the exponent p of cost ~ value^p after each
number.

`--patches` instead times sequential sampling of 64, 256, 1024 and 4096 patches on this machine, and
predicts the memory of a train step with as many patches on a TPU chip, from compiled programs
(`pip install -e '.[tpu]'`), with and without the attention kernel.

The plot needs matplotlib.
"""

import argparse
import functools
import json
import statistics

import comparison
import jax
import numpy as np

import tarflow_jax as tfj
from tarflow_jax import config as configs
from tarflow_jax.training import optimizer as optimizers
from tarflow_jax.training import sharding, state, step
from tarflow_jax.training.corruption import Recipe

BASE = dict(image_size=32, patch_size=4, width=128, blocks=4, layers=2, batch=16, devices=1)
SWEEPS = {
    'image_size': (16, 32, 64),
    'patch_size': (8, 4, 2),
    'width': (64, 128, 256, 512),
    'blocks': (2, 4, 8),
    'layers': (1, 2, 4, 8),
    'batch': (4, 16, 64),
    'devices': (1, 2),
}
PATCHES = {64: 16, 256: 32, 1024: 64, 4096: 128}  # number of patches: image size, with patches of 2x2


def flow(image_size, patch_size, width, blocks, layers, **_) -> tfj.TarFlow:
    return tfj.TarFlow(
        image_size=image_size, image_channels=3, patch_size=patch_size, width=width,
        layers_per_block=(layers,) * blocks, unroll=layers,
    )


def programs(numbers: dict) -> dict:
    """Returns functions that run a train step and sample."""
    model, batch_size = flow(**numbers), numbers['batch']
    mesh = sharding.make_mesh(devices=jax.devices()[: numbers['devices']])
    model = model.clone(layout=sharding.Layout(mesh))
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    variables = jax.device_put(comparison.random_variables(model), whole)
    optimizer = optimizers.adamw(lambda k: 1e-4)
    current = jax.device_put(state.from_variables(variables, optimizer, ema=False), whole)
    train_step = jax.jit(functools.partial(
        step.train_step, model=model, optimizer=optimizer, recipe=Recipe(ema_decay=0.0)
    ))
    shape = (batch_size, *model.image_shape)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    batch = {'image': images, 'label': np.full(batch_size, -1, np.int32)}
    batch = jax.device_put(batch, split)
    key = jax.random.key(0)
    noise = jax.random.normal(key, (batch_size, *model.token_shape))
    noise = jax.device_put(noise, split)
    return {
        'train_step': lambda: jax.block_until_ready(train_step(current, batch, key)),
        'sampling': lambda: jax.block_until_ready(tfj.sample(model, variables, noise)),
    }


def exponent(values, seconds) -> float:
    """Returns p of the least-squares fit of seconds ~ value^p."""
    return round(float(np.polyfit(np.log(values), np.log(seconds), 1)[0]), 2)


def sweep(name: str, repeats: int) -> dict:
    """Times each program at each value."""
    runs = {
        (program, value): run
        for value in SWEEPS[name]
        if name != 'devices' or value <= jax.device_count()
        for program, run in programs(BASE | {name: value}).items()
    }
    seconds = comparison.in_turn(runs, repeats, warm_up=1)
    found = {'train_step': {}, 'sampling': {}}
    for (program, value), times in seconds.items():
        found[program][value] = round(statistics.median(times), 4)
    for value in found['sampling']:
        row = {program: found[program][value] for program in found}
        print(json.dumps({name: value, 'seconds': row} | comparison.versions(False)), flush=True)
    exponents = {p: exponent(list(v), list(v.values())) for p, v in found.items() if len(v) > 1}
    print(json.dumps({'exponents of': name, **exponents}), flush=True)
    return found


def plot(path: str, found: dict) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 7), layout='constrained')
    for axis, (name, programs_) in zip(axes.flat, found.items()):
        for program, seconds in programs_.items():
            axis.loglog(list(seconds), list(seconds.values()), 'o-', label=program.replace('_', ' '))
        axis.set_xticks(list(seconds), [str(v) for v in seconds])
        axis.minorticks_off()
        axis.set(xlabel=name.replace('_', ' '), ylabel='seconds')
        axis.legend()
    for axis in axes.flat[len(found):]:
        axis.axis('off')
    base = ', '.join(f'{name.replace("_", " ")} {value}' for name, value in BASE.items())
    figure.suptitle(f'One number at a time, from {base}; float32, CPU')
    figure.savefig(path, dpi=80)


def sampling_of_patches(count: int, repeats: int) -> dict:
    numbers = BASE | dict(image_size=PATCHES[count], patch_size=2, width=128, blocks=2, batch=1)
    run = programs(numbers)['sampling']
    seconds = comparison.in_turn({'sampling': run}, repeats, warm_up=1)['sampling']
    return {'patches': count, 'sampling_seconds': round(statistics.median(seconds), 3)}


def memory_of_patches(count: int, attention: str, topology: str) -> dict:
    """Returns the memory of a bfloat16 train step per chip, without its parameters."""
    from tarflow_jax.ahead_of_time import report
    from tarflow_jax.ahead_of_time import topology as topologies

    where = topologies.describe(topology)
    config = configs.default()
    config.model.update(
        image_size=PATCHES[count], image_channels=3, patch_size=2, width=768, head_dim=64,
        layers_per_block=(2,) * 2, num_classes=0, dtype='bfloat16', attention=attention,
    )
    config.train.batch_size = where.chips
    row = report.compile_for(config, where, 'train')
    return {
        'patches': count, 'topology': topology, 'kernel': row['attention'],
        'temporary_mib': round(row['hbm_bytes']['temporaries'] / 2**20), 'fits': row['fits'],
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--plot', help='a PNG file')
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--only', choices=SWEEPS, action='append', help='only these numbers')
    parser.add_argument('--patches', action='store_true')
    parser.add_argument('--topology', default='v5e:2x2', help='for --patches')
    args = parser.parse_args()
    sharding.use_cores_as_devices(BASE['batch'])
    if args.patches:
        for count in PATCHES:
            print(json.dumps(sampling_of_patches(count, args.repeats)), flush=True)
        for count in PATCHES:
            for attention in ('auto', 'xla'):
                print(json.dumps(memory_of_patches(count, attention, args.topology)), flush=True)
        return
    found = {name: sweep(name, args.repeats) for name in args.only or SWEEPS}
    if args.plot:
        plot(args.plot, found)


if __name__ == '__main__':
    main()
