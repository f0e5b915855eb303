"""Lowers the programs of training, evaluation and sampling for devices that are not present."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from tarflow_jax import config as configs
from tarflow_jax.ahead_of_time import hlo
from tarflow_jax.evaluation import bits_per_dim
from tarflow_jax.flow import decoder
from tarflow_jax.flow.condition import Condition
from tarflow_jax.sampling.generate import denoised
from tarflow_jax.sampling.schedule import guidance_params
from tarflow_jax.training import sharding
from tarflow_jax.training.metrics import model_flops
from tarflow_jax.training.state import abstract_state, variables_of
from tarflow_jax.training.step import jitted_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program of a step.

    Args:
      lower: returns the `jax.stages.Lowered`.
      times: how often it runs in a step.
    """

    name: str
    lower: Callable
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Step:
    """A repeated step: a train step, the evaluation of a batch, or a batch of samples.

    Args:
      batch_size: batch size over all devices.
      model_flops: FLOPs over all devices, without recomputation.
      resident: abstract arrays that stay on the devices all the time.
      cache_bytes: bytes of the key/value caches over all devices.
    """

    programs: tuple[Program, ...]
    batch_size: int
    model_flops: float
    resident: object
    cache_bytes: float = 0.0


def train(config, plan, mesh) -> Step:
    """Returns a train step on config.train.batch_size images."""
    batch_size = config.train.batch_size
    sharding.check(mesh, batch_size, 'train.batch_size', config.train.accumulation)
    optimizer = configs.optimizer(config, lambda k: 1e-4)
    state = abstract_state(plan.model, optimizer, ema=plan.recipe.ema_decay > 0)
    state = sharding.placed(state, mesh)
    step = jitted_train_step(state, mesh, plan.model, optimizer, plan.recipe)
    program = Program(
        'train_step', lambda: step.lower(state, _batch(plan, mesh, batch_size), _key())
    )
    return Step((program,), batch_size, batch_size * model_flops(plan.model), state)


def evaluate(config, plan, mesh) -> Step:
    """Returns the float32 likelihood of config.evaluate.batch_size images."""
    batch_size = config.evaluate.batch_size
    sharding.check(mesh, batch_size, 'evaluate.batch_size')
    variables = _variables(plan, mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    keys = _split(keys.shape, keys.dtype, sharding.batch_sharding(mesh))
    program = Program('evaluate', lambda: bits_per_dim.dequantized_log_prob.lower(
        plan.model.clone(dtype=jnp.float32), variables, _batch(plan, mesh, batch_size), keys,
        plan.recipe.scored_noise_std,
    ))
    flops = batch_size * model_flops(plan.model) / 3  # forward is a third of a train step
    return Step((program,), batch_size, flops, variables)


def sample(config, plan, mesh) -> Step:
    """Returns the sampling of config.sample.batch_size images with guidance and denoising."""
    model, batch_size, guidance = plan.model, config.sample.batch_size, plan.guidance
    sharding.check(mesh, batch_size, 'sample.batch_size')
    variables = _variables(plan, mesh)
    split = sharding.batch_sharding(mesh)
    sequence = _split((batch_size, *model.token_shape), jnp.float32, split)
    images = _split((batch_size, *model.example_shape), jnp.float32, split)
    batch = _batch(plan, mesh, batch_size)
    condition = Condition(
        labels=batch['label'] if model.num_classes else None,
        noise_std=_number() if model.noise_conditioned else None,
        features=batch.get('features'),
    )
    guided_by = [
        jax.eval_shape(lambda b=b: guidance_params(model, b, guidance))
        for b in range(len(model.layers_per_block))
    ]
    # Blocks with the same depth and the same guidance share a program.
    kinds = [(depth, g.branches) for depth, g in zip(model.layers_per_block, guided_by)]

    def block(index: int) -> Callable:
        return lambda: decoder.invert.lower(
            model.block(index), sequence, variables['params'][f'block_{index}'], condition,
            model.block_orders()[index], guided_by[index],
        )

    programs = [
        Program(f'invert_block of {kind[0]} layers', block(kinds.index(kind)), kinds.count(kind))
        for kind in dict.fromkeys(kinds)
    ]
    layers = sum(branches * depth for depth, branches in kinds) / sum(model.layers_per_block)
    flops = batch_size * layers * model_flops(model) / 3
    if plan.denoising:
        step = jax.jit(lambda v, x, c: denoised(model, v, x, c, plan.denoising))
        programs.append(Program('denoise', lambda: step.lower(variables, images, condition)))
        steps = max(1, len(plan.denoising.levels))
        flops += steps * batch_size * model_flops(model) * 2 / 3  # forward, and backward to x
    cache = max(depth * branches for depth, branches in kinds)
    cache *= batch_size * 2 * model.token_shape[0] * model.width
    cache *= jnp.dtype(model.dtype).itemsize
    return Step(tuple(programs), batch_size, flops, variables, cache)


PROGRAMS = {'train': train, 'evaluate': evaluate, 'sample': sample}


def _split(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def _key():
    return jax.eval_shape(lambda: jax.random.key(0))


def _number():
    return jax.ShapeDtypeStruct((), jnp.float32)


def _batch(plan, mesh, batch_size: int) -> dict:
    model, where = plan.model, sharding.batch_sharding(mesh)
    batch = {
        'image': _split((batch_size, *model.example_shape), jnp.uint8, where),
        'label': _split((batch_size,), jnp.int32, where),
    }
    if model.num_features:
        batch['features'] = _split((batch_size, model.num_features), jnp.float32, where)
    return batch


def _variables(plan, mesh) -> dict:
    state = abstract_state(plan.model, optax.identity(), ema=False)
    return sharding.placed(variables_of(state.params, state.prior), mesh)


def splash_cost(call: hlo.Instruction) -> tuple[float, float, float] | None:
    """Returns FLOPs, FLOPs with MXU padding, and HBM bytes of a splash attention kernel.

    The kernel skips tiles above the diagonal. Its matrix products have head_dim as the contracted
    or last axis, which the MXU processes in units of 128.
    """
    # Number of products (the backward kernel also computes dq), and the index of the result
    # [B, H, T, K] (without B if it is 1).
    known = {'fwd': (2, -2), 'dkv': (5, -1)}
    found = [how for name, how in known.items() if f'splash_mha_{name}' in call.op_name]
    if not found:
        return None
    ((products, result),) = found
    *rows, length, head_dim = call.arrays[result].dims
    tiles = max(1, length // 512)
    part = (tiles + 1) / (2 * tiles)
    flops = products * 2.0 * math.prod(rows) * length * length * head_dim * part
    return flops, flops * max(1.0, 128 / head_dim), 0.0
