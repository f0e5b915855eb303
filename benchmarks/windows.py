"""Times the inverse of one block with windows of each size: `python benchmarks/windows.py --width=768`.

These are the choices of `calibrate`, for an untrained flow of 256 patches and one or more images.
It prints one line of JSON per window: sequential network calls, seconds, and milliseconds per call.
A window of 1 is sequential decoding.
"""

import argparse
import functools
import json
import statistics

import automatic
import comparison
import jax
import jax.numpy as jnp

from tarflow_jax.sampling.schedule import BlockSchedule, run_block

BLOCK = 3  # sampling inverts this block first


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--width', type=int, default=768)
    parser.add_argument('--batch', type=int, default=1)
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
    parser.add_argument('--tolerance', type=float, default=1e-4)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()
    model, variables, _ = automatic.untrained(args.width)
    model = model.clone(dtype=jnp.dtype(args.dtype))
    T = model.num_patches
    z = jax.random.normal(jax.random.key(0), (args.batch, T, model.patch_dim))
    labels = jnp.zeros(args.batch, jnp.int32)

    def solve(window):
        how = BlockSchedule(T // window if window > 1 else 0, args.tolerance)
        return jax.block_until_ready(
            run_block(model, variables, BLOCK, how, z, labels, guidance=None)
        )

    windows = [1] + [T >> i for i in reversed(range(7))]
    seconds = comparison.in_turn({w: functools.partial(solve, w) for w in windows}, args.repeats)
    for window, times in seconds.items():
        calls, median = int(solve(window).calls), statistics.median(times)
        row = {'window': window, 'calls': calls, 'seconds': round(median, 4)}
        row['milliseconds_of_a_call'] = round(1e3 * median / calls, 3)
        print(json.dumps(row | comparison.versions(with_official=False)), flush=True)


if __name__ == '__main__':
    main()
