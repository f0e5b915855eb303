"""Compares predicted with published measured steps: `python benchmarks/published_steps.py`.

It compiles the train step of a language model whose measured speed is published, for the TPU slice
of the measurement, and prints measured over predicted time, one line of JSON per run. The step is
written in plain JAX, with the shapes, sharding and rematerialization of the published run.
`MEASURED` in tarflow_jax/ahead_of_time/chips.py has the range of the ratios for each chip, and
`--mode=compile` prints it with every step. The script needs the TPU compiler and takes minutes per
run.

Sources of the measurements:
  maxtext   "Expected performance results" in MaxText's MaxText/configs/v5e/README.md and
            v5p/README.md, with the scripts beside them (github.com/AI-Hypercomputer/maxtext). They
            count 6 FLOPs for each parameter and token, and half of the attention's square.
  recipes   training/trillium and training/ironwood of github.com/AI-Hypercomputer/tpu-recipes, which
            print seconds for each step.
"""

import argparse
import dataclasses
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tarflow_jax.ahead_of_time import cost, programs, topology
from tarflow_jax.training import sharding
from tarflow_jax.training.sharding import BATCH, FSDP, TENSOR

OPERANDS = ('query', 'key', 'value')  # operands of attention


@dataclasses.dataclass(frozen=True)
class Run:
    """A published run.

    Args:
      batch: sequences per JAX device.
      tensor: number of devices that shard heads and hidden channels; the rest shard the parameters.
      remat: 'full' saves the inputs of layers; 'dots' also saves the results of products with
        weights; 'attention' also saves the operands and the result of attention; 'offload' moves
        those, the inputs and the projection after attention to the host.
      seconds, tflops: the measurement, one of the two; tflops are per second and chip.
    """

    topology: str
    source: str
    batch: int
    length: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    layers: int
    vocabulary: int = 32_000
    head_dim: int = 128
    tensor: int = 1
    remat: str = 'full'
    mean_dtype: str = 'float32'  # dtype of Adam's mean
    collective_products: bool = True  # the compiler may interleave pieces of products with a gather
    seconds: float | None = None
    tflops: float | None = None

    @property
    def parameters(self) -> int:
        """Counts parameters as the measured speed does: those of layers and both embeddings."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim
        layer = self.width * (attention + 3 * self.hidden)
        return self.layers * layer + 2 * self.vocabulary * self.width

    def measured_seconds(self, devices_per_chip: int) -> float:
        if self.seconds:
            return self.seconds
        tokens = self.batch * self.length
        attention = 6 * self.layers * self.heads * self.head_dim * self.length
        flops = tokens * (6 * self.parameters + attention)
        return devices_per_chip * flops / (self.tflops * 1e12)


RUNS = {
    'v5e 16B': Run('v5e:16x16', 'maxtext', 6, 2048, 4096, 64, 64, 28672, 32, tflops=120),
    'v5e 32B': Run('v5e:16x16', 'maxtext', 4, 2048, 8192, 64, 64, 28672, 32, tflops=132),
    'v5e 16B on 2 slices': Run('2*v5e:16x16', 'maxtext', 6, 2048, 4096, 64, 64, 28672, 32, tflops=117),
    # One sequence fewer than published: with 7, this program exceeds the memory by 3%.
    'v5p 32B': Run(
        'v5p:4x4x4', 'maxtext', 6, 2048, 8192, 64, 64, 28672, 32, tensor=4, remat='dots', tflops=328
    ),
    'v6e 8B': Run(
        'v6e:4x4', 'recipes', 3, 8192, 4096, 32, 8, 14336, 32, vocabulary=128_256,
        remat='offload', collective_products=False, seconds=3.393,
    ),
    'tpu7x 70B': Run(
        'tpu7x:4x4x4', 'recipes', 2, 8192, 8192, 64, 8, 28672, 80, vocabulary=128_256,
        remat='attention', mean_dtype='bfloat16', seconds=12.20,
    ),
}


def weights(run: Run) -> dict[str, tuple[tuple[int, ...], P]]:
    """Returns the shape and sharding of every array of weights; layers are stacked."""
    L, C, F = run.layers, run.width, run.hidden
    keys = (L, C, run.kv_heads, run.head_dim)
    into, out = P(None, FSDP, TENSOR), P(None, TENSOR, None, FSDP)
    return {
        'embedding': ((run.vocabulary, C), P(TENSOR, FSDP)),
        'query': ((L, C, run.heads, run.head_dim), into),
        'key': (keys, into),
        'value': (keys, into),
        'out': ((L, run.heads, run.head_dim, C), out),
        'gate': ((L, C, F), into),
        'up': ((L, C, F), into),
        'down': ((L, F, C), P(None, TENSOR, FSDP)),
        'norms': ((L, 2, C), P()),
        'last_norm': ((C,), P()),
        'unembedding': ((C, run.vocabulary), P(FSDP, TENSOR)),
    }


def normed(x, scale):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    return (wide * scale).astype(x.dtype)


def rotated(x_BxTxHxK):
    """Applies rotary position encoding."""
    T, half = x_BxTxHxK.shape[1], x_BxTxHxK.shape[3] // 2
    angle = jnp.arange(T)[:, None] * 10_000 ** -(jnp.arange(half) / half)
    sin, cos = jnp.sin(angle)[:, None], jnp.cos(angle)[:, None]
    a, b = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BxTxHxK.dtype)


def attention(q, k, v, mesh):
    """Computes causal attention, [B, T, H, K], with the splash kernel on each device's heads."""
    length = q.shape[1]
    block = min(512, length)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, use_fused_bwd_kernel=True,
    )

    def alone(q, k, v):
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[2])
        kernel = splash.make_splash_mha_single_device(mask, block_sizes=sizes)
        q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[3] ** -0.5, k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    spec = P(BATCH, None, TENSOR)
    repeats = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, repeats, 2) for x in (k, v))
    return jax.shard_map(alone, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(q, k, v)


def loss(params, tokens_BxT, run: Run, mesh):
    """Computes the cross entropy of the next token; float32 weights, bfloat16 products."""

    def split(x, *axes):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(BATCH, None, *axes)))

    def layer(x, w):
        w = jax.tree.map(lambda a: a.astype(jnp.bfloat16), w)
        x = checkpoint_name(split(x, TENSOR), 'input')
        h = normed(x, w['norms'][0])
        q, k, v = (
            split(jnp.einsum('btc,chk->bthk', h, w[name]), TENSOR) for name in OPERANDS
        )
        q, k, v = (checkpoint_name(a, n) for a, n in zip((rotated(q), rotated(k), v), OPERANDS))
        context = checkpoint_name(attention(q, k, v, mesh), 'context')
        out = jnp.einsum('bthk,hkc->btc', context, w['out'])
        x = x + checkpoint_name(split(out, TENSOR), 'out')
        h = normed(x, w['norms'][1])
        gate, up = (
            split(jnp.einsum('btc,cf->btf', h, w[name]), TENSOR) for name in ('gate', 'up')
        )
        return split(x + jnp.einsum('btf,fc->btc', jax.nn.silu(gate) * up, w['down']), TENSOR), None

    policies = jax.checkpoint_policies
    policy = {
        'full': policies.nothing_saveable,
        'dots': policies.checkpoint_dots_with_no_batch_dims,
        'attention': policies.save_only_these_names(*OPERANDS, 'context'),
        'offload': policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[*OPERANDS, 'input', 'out'],
            offload_src='device', offload_dst='pinned_host',
        ),
    }[run.remat]
    ends = ('embedding', 'last_norm', 'unembedding')
    stacked = {name: w for name, w in params.items() if name not in ends}
    # The published runs look tokens up by a product with one-hot rows.
    rows = jax.nn.one_hot(tokens_BxT, run.vocabulary, dtype=jnp.bfloat16)
    x = split(rows @ params['embedding'].astype(jnp.bfloat16), TENSOR)
    x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, stacked)
    x = normed(x, params['last_norm']).astype(jnp.float32)
    logits = split(x @ params['unembedding'], TENSOR)
    targets = jax.nn.one_hot(jnp.roll(tokens_BxT, -1, 1), run.vocabulary)
    return (jax.nn.logsumexp(logits, -1) - (logits * targets).sum(-1)).mean()


def compiled(run: Run, where: topology.Topology):
    """Compiles the train step; returns it with its mesh."""
    mesh = sharding.make_mesh(where.slices, -1, run.tensor, devices=where.devices)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(3e-5, 0.9, 0.95, weight_decay=0.1, mu_dtype=run.mean_dtype),
    )

    def step(params, moments, tokens):
        value, grads = jax.value_and_grad(loss)(params, tokens, run, mesh)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, (shape, _) in weights(run).items()}
    places = {name: NamedSharding(mesh, spec) for name, (_, spec) in weights(run).items()}
    moments = jax.eval_shape(optimizer.init, shapes)
    moment_places = optax.tree_map_params(
        optimizer, lambda _, place: place, moments, places,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
    )
    placed = functools.partial(
        jax.tree.map, lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    )
    tokens = jax.ShapeDtypeStruct(
        (run.batch * len(where.devices), run.length), jnp.int32,
        sharding=NamedSharding(mesh, P(BATCH)),
    )
    jitted = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=(places, moment_places, NamedSharding(mesh, P()))
    )
    # MaxText calls this DISABLE_COLLECTIVE_MATMUL.
    never = {'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}
    lowered = jitted.lower(placed(shapes, places), placed(moments, moment_places), tokens)
    return lowered.compile(None if run.collective_products else never), mesh


def compared(name: str, run: Run, text: Path | None) -> dict:
    """Compiles a run and compares its time; writes the program's text to `text`."""
    where = topology.describe(run.topology)
    start = time.perf_counter()
    program, mesh = compiled(run, where)
    seconds = time.perf_counter() - start
    if text:
        text.write_text(program.as_text())
    costs = cost.analyse(program.as_text(), where.where(mesh), kernel_cost=programs.splash_cost)
    measured = run.measured_seconds(len(where.devices) // where.chips)
    memory = program.memory_analysis()
    return {
        'run': name,
        'source': run.source,
        'topology': run.topology,
        'parameters': run.parameters,
        'measured_seconds': round(measured, 3),
        'predicted_seconds': round(costs.predicted_seconds, 3),
        'compiler_seconds': round(costs.compiler_seconds, 3),
        'measured_over_predicted': round(measured / costs.predicted_seconds, 3),
        'compute_seconds': round(costs.compute_seconds, 3),
        'memory_seconds': round(costs.memory_seconds, 3),
        'interconnect_seconds': round(costs.interconnect_seconds, 3),
        'exposed_seconds': round(costs.exposed_seconds, 3),
        'gib': round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 2**30, 1),
        'uncounted': list(costs.uncounted_kernels()),
        'compile_seconds': round(seconds, 1),
        'jax': jax.__version__,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--runs', default=','.join(RUNS), help='names of runs, separated by commas')
    parser.add_argument('--out', type=Path, help='folder for the text of the compiled programs')
    given = parser.parse_args()
    names = given.runs.split(',')
    if unknown := [name for name in names if name not in RUNS]:
        parser.error(f'--runs={unknown[0]} must be one of {", ".join(RUNS)}')
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        text = given.out and given.out / f'{name.replace(" ", "_")}.hlo.txt'
        print(json.dumps(compared(name, RUNS[name], text)), flush=True)


if __name__ == '__main__':
    main()
