"""Compares attention kernels: `python benchmarks/attention.py --device=gpu`.

It compares 'cudnn', which bfloat16 flows use on a GPU, and 'xla' in bfloat16 with 'xla' in float32:
the largest errors of outputs and gradients relative to the largest magnitude, and the time of a
forward and backward pass. It prints one line of JSON per shape. The first shape has one scale per
image, as in guidance by temperature. On a CPU, which has no cudnn, it uses the interpreted TPU
kernel.
"""

import functools
import json
import statistics

import comparison
import jax
import jax.numpy as jnp

from tarflow_jax.flow.attention import causal_attention

# images, heads, tokens, head_dim
SHAPES = {
    'gpu': ((4, 12, 256, 64), (16, 12, 1024, 64), (4, 25, 1024, 64)),
    'cpu': ((1, 2, 128, 64),),
}
KERNELS = {'gpu': 'cudnn', 'cpu': 'whole_head_interpreted'}


def compared(shape, kernel: str, scales: bool, repeats: int) -> dict:
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v, weights = (jax.random.normal(key, shape) for key in keys[:4])
    scale = shape[-1] ** -0.5
    if scales:
        scale = scale * jax.random.uniform(keys[4], (shape[0], 1, 1, 1), minval=0.5, maxval=2.0)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def both_ways(kernel, dtype):
        def total(q, k, v):
            out = causal_attention(kernel, q, k, v, scale)
            return (out.astype(jnp.float32) * weights).sum(), out

        operands = [x.astype(dtype) for x in (q, k, v)]
        (_, out), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*operands)
        return out, grads

    # The float32 reference for the rounded operands.
    q, k, v = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v))
    wanted, wanted_grads = both_ways('xla', 'float32')
    row = {'shape': shape, 'scales': scales}
    for name in ('xla', kernel):
        run = lambda name=name: jax.block_until_ready(both_ways(name, 'bfloat16'))  # noqa: E731
        out, grads = run()
        seconds = comparison.in_turn({name: run}, repeats)[name]
        row[name] = {
            'output_error': comparison.error(out, wanted),
            'gradient_errors': [comparison.error(a, b) for a, b in zip(grads, wanted_grads)],
            'milliseconds': round(1e3 * statistics.median(seconds), 3),
        }
    return row


def main():
    args = comparison.arguments(__doc__, repeats=20).parse_args()
    comparison.use(args.device)
    for number, shape in enumerate(SHAPES[args.device]):
        row = compared(shape, KERNELS[args.device], number == 0, args.repeats)
        print(json.dumps({'what': 'attention'} | row | comparison.versions(False)), flush=True)


if __name__ == '__main__':
    main()
