"""Times tracing and compilation: `python benchmarks/compile_time.py`.

It measures the seconds to trace, lower and compile the train step and the sequential sampler, each
in its own process, first with an empty compilation cache and then with a filled one.
`--layers_as=loop` compiles one layer for all. With `--official=PATH` it also times the first train
step of the official code, which compiles nothing, minus a later step. It prints one line of JSON
per program.
"""

import json
import os
import subprocess
import sys
import tempfile
import time

import comparison
import numpy as np

from tarflow_jax.training import sharding

PROGRAMS = ('train_step', 'sampler')


def first_call(program: str, size: str, unroll: int) -> dict:
    """Returns the seconds of the first call and of a later call."""
    import sampling
    import train_step

    sharding.use_cores_as_devices(2)
    model = comparison.our_model(size).clone(unroll=unroll)
    variables = comparison.random_variables(model)
    if program == 'train_step':
        batch = train_step.random_batch(model, train_step.BATCH[size])
        return timed(lambda: train_step.OurStep(model, variables, batch, 1))
    noise = np.zeros((2, *model.token_shape), np.float32)
    return timed(lambda: sampling.OurSampler(model, variables, noise, np.zeros(2, np.int32), 0.0))


def timed(make) -> dict:
    """Times `make` plus the first call of its result, and the third call."""
    start = time.perf_counter()
    run, seconds = make(), []
    for _ in range(3):
        run()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    return {'first': seconds[0], 'later': seconds[2]}


def in_a_process(*arguments: str, cache: str) -> dict:
    environment = os.environ | {
        'JAX_COMPILATION_CACHE_DIR': cache,
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
        'JAX_PLATFORMS': 'cpu',
    }
    command = [sys.executable, __file__, '--child', *arguments]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def official_first_step(checkout: str, size: str) -> dict:
    import train_step

    model = comparison.our_model(size)
    variables = comparison.random_variables(model)
    theirs = comparison.official_model(checkout, model, variables)
    batch = train_step.random_batch(model, train_step.BATCH[size])
    return timed(lambda: train_step.OfficialStep(theirs, batch, 'float32', 'cpu'))


def main():
    parser = comparison.arguments(__doc__, repeats=1)
    parser.add_argument('--layers_as', choices=('unrolled', 'loop'), default='unrolled')
    parser.add_argument('--child', choices=PROGRAMS, help='only this program, in this process')
    args = parser.parse_args()
    unroll = comparison.our_model(args.size).unroll if args.layers_as == 'unrolled' else 1
    if args.child:
        print(json.dumps(first_call(args.child, args.size, unroll)))
        return
    for program in PROGRAMS:
        with tempfile.TemporaryDirectory() as cache:
            options = (program, f'--size={args.size}', f'--layers_as={args.layers_as}')
            found = [in_a_process(*options, cache=cache) for _ in range(2)]
        cold, cached = (run['first'] - run['later'] for run in found)
        row = {
            'program': program, 'size': args.size, 'layers_as': args.layers_as,
            'seconds': round(cold, 2), 'seconds_with_cache': round(cached, 2),
        }
        if args.official and program == 'train_step':
            theirs = official_first_step(args.official, args.size)
            row['official_seconds'] = round(theirs['first'] - theirs['later'], 2)
        print(json.dumps(row | comparison.versions(bool(args.official))), flush=True)


if __name__ == '__main__':
    main()
