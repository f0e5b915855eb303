"""The train step: one pure function that training, compilation, benchmarks and tests all call."""

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
    """One update on a batch of 8-bit images.

    Args:
      batch: image uint8 [B, H, W, C], label int32 [B], and features float32 [B, F] for a flow that
        takes them.
      key: of the whole run; the step folds its own number into it.
    Returns:
      the next state, and metrics: the loss and its two terms (nats per dimension), the gradient's
      global norm before clipping, the mean square of every block's output, and how many steps so
      far were skipped. A step whose gradient is not finite is: only `step` and `skipped` go on.
    """
    noise_key, drop_key = jax.random.split(jax.random.fold_in(key, state.step))
    images, noise_std, weight = corrupt(noise_key, batch['image'], recipe)
    dropped = jax.random.bernoulli(drop_key, recipe.label_dropout, images.shape[:1])
    condition = drop(condition_of(model, batch, noise_std), dropped)
    return update(
        state, images, condition, weight, model=model, optimizer=optimizer, recipe=recipe
    )


def jitted_train_step(state: TrainState, mesh: Mesh, model, optimizer, recipe: Recipe):
    """`train_step` jit-compiled for a mesh; donates the state.

    The arrays of `state`, which may be abstract, say how the next state is split; metrics are on
    every device.
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
    """As `train_step`, on examples [B, ...] as the flow takes them.

    Args:
      examples: with their noise.
      condition: None, labels or a `Condition`, with what is to be dropped already dropped.
      weight: of each example's loss, [B]; None is 1.
    """
    batch = examples, per_example(condition, examples.shape[0]), weight
    gradients = functools.partial(_gradients, parts=recipe.accumulation)
    if model.layout.devices_alone:
        gradients = _each_device_alone(gradients, model.layout.mesh)
        model = model.clone(layout=OneDevice())
    grads, metrics, prior = gradients(state, batch, model=model)
    # What follows takes the gradients as they are. XLA's CPU backend would stack those of a block's
    # layers once for the norm and once more for the update.
    grads = jax.lax.optimization_barrier(grads)
    metrics['gradient_norm'] = optax.global_norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)

    ema_params = state.ema_params
    if ema_params is not None:
        # A young average follows closely, so that short runs are not mostly initialisation.
        decay = jnp.minimum(recipe.ema_decay, (1.0 + state.step) / (10.0 + state.step))
        ema_params = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), ema_params, params)

    # NaN if any gradient is. A finite gradient can still overflow the parameters, with an absurd
    # learning rate: the loop looks before it saves. To look here would cost a pass over the state.
    finite = jnp.isfinite(metrics['gradient_norm'])
    after = state._replace(params=params, ema_params=ema_params, opt_state=opt_state, prior=prior)
    after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state)
    metrics['skipped'] = state.skipped + jnp.where(finite, 0, 1)
    return after._replace(step=state.step + 1, skipped=metrics['skipped']), metrics


def _each_device_alone(gradients, mesh: Mesh):
    """`_gradients` by every device over its images of the batch, and their mean over the devices.

    On a CPU a step takes 6% less time than with the mean of every part taken by the partitioner:
    that puts it between the product that is a weight's gradient and its transposition, which XLA
    can then no longer do as one product, and does it once for every part.
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
    """Gradient, metrics and moved prior over a batch (examples, condition, weight).

    The batch is worked through in `parts` parts. Each result is a mean over the examples, and hence
    over the parts.
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
    # Part i takes every parts-th example: with the batch sharded over devices in runs of
    # consecutive examples, each device then finds its share of every part at home.
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], split))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, batch):
        return jax.tree.map(jnp.add, total, part(batch)), None

    total, _ = jax.lax.scan(accumulate, zeros, split)
    return jax.tree.map(lambda x: x / parts, total)


def _moved(prior, z):
    """The prior of the next step; None for flows whose prior does not move."""
    if prior is None:
        return None
    return {'variance': likelihood.moved_prior_variance(prior['variance'], z)}
