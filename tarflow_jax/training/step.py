"""The train step, a pure function, for training, compilation, benchmarks and tests alike."""

import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tarflow_jax.flow import likelihood
from tarflow_jax.flow.condition import drop, per_example
from tarflow_jax.flow.flow import Flow
from tarflow_jax.flow.transformer import OneDevice
from tarflow_jax.training import sharding
from tarflow_jax.training.corruption import Recipe, condition_of, corrupt
from tarflow_jax.training.state import TrainState, variables_of


def train_step(
    state: TrainState,
    batch: dict,
    key: jax.Array,
    *,
    model: Flow,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the state on a batch of 8-bit images.

    Skips the update if the gradient is not finite: only `step` and `skipped` change then.

    Args:
      batch: image uint8 [B, H, W, C], label int32 [B], and features float32 [B, F] if the flow
        takes them.
      key: the run's key, the same at every step; the step's number is folded in here.
    Returns:
      the next state, and metrics: the loss and its two terms (nats per dimension), the gradient's
      global norm before clipping, the mean square of every block's output, and the number of steps
      skipped so far.
    """
    noise_key, drop_key = jax.random.split(jax.random.fold_in(key, state.step))
    images, noise_std, weight = corrupt(noise_key, batch['image'], recipe)
    dropped = jax.random.bernoulli(drop_key, recipe.label_dropout, images.shape[:1])
    condition = drop(condition_of(model, batch, noise_std), dropped)
    return update(
        state, images, condition, weight, model=model, optimizer=optimizer, recipe=recipe
    )


def jitted_train_step(state: TrainState, mesh: Mesh, model, optimizer, recipe: Recipe):
    """Jit-compiles `train_step` for a mesh; donates the state.

    The next state is sharded like `state`, which may be abstract; metrics are replicated.
    """
    return jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, recipe=recipe),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)),
    )


def update(
    state: TrainState,
    examples: jax.Array,
    condition=None,
    weight: jax.Array | None = None,
    *,
    model: Flow,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Updates the state as `train_step` does, on examples [B, ...] as the flow takes them.

    Args:
      examples: with noise already added.
      condition: None, labels or a `Condition`; labels and features are dropped already.
      weight: weight of each example's loss, [B]; None is 1.
    """
    batch = examples, per_example(condition, examples.shape[0]), weight
    gradients = functools.partial(_gradients, parts=recipe.accumulation)
    if model.layout.devices_alone:
        gradients = _each_device_alone(gradients, model.layout.mesh)
        model = model.clone(layout=OneDevice())
    grads, metrics, prior = gradients(state, batch, model=model)
    # Without the barrier XLA's CPU backend stacks the gradients of a block's layers twice: for the
    # norm and for the update.
    grads = jax.lax.optimization_barrier(grads)
    metrics['gradient_norm'] = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    ema_params = state.ema_params
    if ema_params is not None:
        # The decay starts low, so that the average of a short run is not mostly initialization.
        decay = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema_params, params)

    # The norm is NaN if any gradient is. With an absurd learning rate a finite gradient can still
    # overflow the parameters. A check here would cost a pass over the state, so the loop checks
    # before it saves.
    finite = jnp.isfinite(metrics['gradient_norm'])
    after = state._replace(params=params, ema_params=ema_params, opt_state=opt_state, prior=prior)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    metrics['skipped'] = state.skipped + jnp.where(finite, 0, 1)
    return after._replace(step=state.step + 1, skipped=metrics['skipped']), metrics


def _each_device_alone(gradients, mesh: Mesh):
    """Lets every device compute `_gradients` of its own images, then averages over the devices.

    On a CPU this makes a step 6% faster than leaving the mean to the partitioner. The partitioner
    averages once for every part of the batch, and puts the mean between a weight gradient's matmul
    and its transpose, which XLA can then no longer fuse.
    """

    def mean(state, batch, *, model):
        def one(state, batch):
            return jax.lax.pmean(gradients(state, batch, model=model), sharding.BATCH)

        specs = (P(), P(sharding.BATCH))
        # The kernels' gradients are sums over local images only, which check_vma would average.
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
            state, batch
        )

    return mean


def _gradients(state: TrainState, batch, model: Flow, parts: int):
    """Returns gradient, metrics and moved prior for a batch (examples, condition, weight).

    Goes through the batch in `parts` equal parts. All results are means over the examples, so the
    means over the parts give the same.
    """

    def loss_fn(params, examples, condition, weight):
        variables = variables_of(params, state.prior)
        sequences, logdet = model.apply(variables, examples, condition, method='trajectory')
        loss, terms = likelihood.training_loss(sequences[-1], logdet, weight)
        squares = jnp.stack([jnp.square(x).mean() for x in sequences])
        metrics = {'loss': loss, **terms, 'block_mean_square': squares}
        return loss, (metrics, _moved(state.prior, sequences[-1]))

    def part(batch):
        grads, (metrics, prior) = jax.grad(loss_fn, has_aux=True)(state.params, *batch)
        return grads, metrics, prior

    if parts == 1:
        return part(batch)
    # Part i takes every parts-th example. Each device holds consecutive examples of the batch, so
    # it already holds its share of every part.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, batch):
        return jax.tree.map(jnp.add, total, part(batch)), None

    total, _ = jax.lax.scan(accumulate, zeros, split)
    return jax.tree.map(lambda x: x / parts, total)


def _moved(prior, z):
    """Returns the prior of the next step; None for flows whose prior is fixed."""
    if prior is None:
        return None
    return {'variance': likelihood.moved_prior_variance(prior['variance'], z)}
