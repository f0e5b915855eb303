"""Runs of the command line on a set of images so small that a run takes seconds."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from parity_cases import FOLDER

from tarflow_jax import main, paths
from tarflow_jax.data.idx import write_idx

ROOT = Path(main.__file__).parents[1]
QUICKSTART = f'--config={ROOT}/configs/fashion_mnist.py'
OFFICIAL = FOLDER / 'cond_gray' / 'model.pth'
# The fields of that checkpoint's model, beside what `flags` has in common with it.
COND_GRAY = dict(
    model__patch_size=4, model__width=64, model__head_dim=64, model__layers_per_block='(1,1,1)'
)
# What differs between two runs of the same training.
CLOCK = ('wall_time', 'images_per_second', 'model_flops_per_second', 'data_wait', 'goodput')

compilations = []  # an entry or more for every program that was compiled, or fetched as compiled
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compilations.append(event) if '/compile/' in event else None
)


def write_images(folder, size=16, classes=5, train=96, test=20):
    """An IDX folder of random images; returns it."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (('train', train), ('t10k', test)):
        pixels = rng.integers(0, 256, (count, size, size), np.uint8)
        write_idx(folder / f'{name}-images-idx3-ubyte', pixels)
        write_idx(folder / f'{name}-labels-idx1-ubyte', (np.arange(count) % classes).astype('u1'))
    return folder


def flags(workdir, images=None, **fields) -> list[str]:
    """The flags of a run of 12 steps, six to an epoch; fields as model__width=32."""
    tiny = dict(
        model__image_size=16, model__patch_size=8, model__width=32, model__head_dim=16,
        model__layers_per_block='(1,)', model__num_classes=5, model__unroll=1,
        train__batch_size=16, train__epochs=2.0, train__warmup_epochs=0.5, train__ema_decay=0.9,
        train__log_every=1, train__sample_every=1000, train__checkpoint_every=3,
        train__validate_every=0, train__label_dropout=0.3, guidance__weight=0.0, evaluate__metrics='()',
        evaluate__batch_size=8, sample__count=13, sample__batch_size=8,
        report__after_training=False,
    )
    if images is not None:
        tiny |= {'data__source': 'idx', 'data__path': str(images)}
    given = (tiny | fields).items()
    return [QUICKSTART, f'--workdir={workdir}'] + [
        f'--config.{name.replace("__", ".")}={value}' for name, value in given if value is not None
    ]


def call(*arguments) -> int:
    """The exit code of the command line, run in this process."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return main.main(['main', *map(str, arguments)])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)


def start(*arguments, program=('-m', 'tarflow_jax.main'), **options) -> subprocess.Popen:
    """The command line in a process of its own, as a user runs it: without what conftest sets."""
    set_there = ('XLA_FLAGS', 'JAX_COMPILATION_CACHE_DIR')
    environment = {k: v for k, v in os.environ.items() if k not in set_there}
    path = os.pathsep.join(p for p in (str(ROOT), environment.get('PYTHONPATH')) if p)
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env={**environment, 'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )


def with_devices(count: int) -> str:
    """This process's XLA_FLAGS with another number of devices: the same programs, to the bit."""
    return re.sub(r'(device_count=)\d+', rf'\g<1>{count}', os.environ['XLA_FLAGS'])


def start_processes(count, program, *arguments, devices=1) -> list[subprocess.Popen]:
    """One run of `count` processes with so many devices each; of one, a run as any other."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get('PYTHONPATH')) if p)
    started = []
    for i in range(count):
        many = dict(
            JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(i)
        )
        environment = os.environ | (many if count > 1 else {}) | dict(
            PYTHONPATH=path, JAX_PLATFORMS='cpu',
            XLA_FLAGS=with_devices(devices),
        )
        started.append(subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ))
    return started


def ended(started, timeout=480) -> list[tuple[int, str]]:
    """Exit codes and outputs of all, in order."""
    outputs = [process.communicate(timeout=timeout)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs)]


def saved(workdir, step: int) -> dict:
    """Everything that a checkpoint holds, as {name: bytes}."""
    found = {}
    # It warns that it takes the places of the arrays from a file; here they come to the host.
    warnings.filterwarnings('ignore', 'Sharding info not provided')
    for item in ('weights', 'progress'):
        path = paths.absolute(workdir) / 'checkpoints' / str(step) / item
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore(path)
        for name, leaf in jax.tree.leaves_with_path(tree):
            found[item + jax.tree_util.keystr(name)] = np.asarray(leaf).tobytes()
    return found


def metrics(workdir) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (paths.of(workdir) / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in lines]


def files(folder) -> dict:
    """Every file below a folder with its content and time of change."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(Path(folder).rglob('*')) if path.is_file()
    }
