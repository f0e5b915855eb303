"""The train step: one pure function that training, compilation, benchmarks and tests all call."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tarflow_jax.flow import likelihood
from tarflow_jax.flow.layers import OneDevice
from tarflow_jax.flow.model import TarFlow
from tarflow_jax.training import sharding
from tarflow_jax.training.state import TrainState, variables_of

NOISES = ('gaussian', 'uniform')


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the train step does to a batch.

    Args:
      noise: 'gaussian' adds noise_std * N(0, 1) to images in [-1, 1] (generation);
        'uniform' dequantises (likelihood).
      label_dropout: probability that a label is replaced by -1, "no class".
      ema_decay: of the moving average of the parameters; 0 keeps none.
      accumulation: the batch is worked through in this many equal parts, their gradients averaged.
    """

    noise: str = 'gaussian'
    noise_std: float = 0.05
    label_dropout: float = 0.1
    ema_decay: float = 0.9999
    accumulation: int = 1

    def __post_init__(self):
        if self.noise not in NOISES:
            raise ValueError(f'train.noise {self.noise!r} is none of {", ".join(NOISES)}.')
        for field, low in (('noise_std', 0.0), ('label_dropout', 0.0), ('ema_decay', 0.0)):
            value = getattr(self, field)
            if not low <= value < 1:
                raise ValueError(f'train.{field} {value} must be at least {low} and below 1.')
        if self.accumulation < 1:
            raise ValueError(f'train.accumulation {self.accumulation} must be at least 1.')


def add_noise(key: jax.Array, pixels: jax.Array, recipe: Recipe) -> jax.Array:
    """8-bit pixels to the noisy float32 images in [-1, 1] that the flow is trained on."""
    if recipe.noise == 'uniform':
        return likelihood.dequantise(key, pixels)
    return likelihood.add_gaussian_noise(key, likelihood.to_unit_range(pixels), recipe.noise_std)


def train_step(
    state: TrainState,
    batch: dict,
    key: jax.Array,
    *,
    model: TarFlow,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update on a batch of 8-bit images.

    Args:
      batch: image uint8 [B, H, W, C], label int32 [B].
      key: of the whole run; the step folds its own number into it.
    Returns:
      the next state, and metrics: the loss and its two terms (nats per dimension), the gradient's
      global norm before clipping, the mean square of every block's output, and how many steps so
      far were skipped. A step whose gradient is not finite is: only `step` and `skipped` go on.
    """
    noise_key, label_key = jax.random.split(jax.random.fold_in(key, state.step))
    images = add_noise(noise_key, batch['image'], recipe)
    dropped = jax.random.bernoulli(label_key, recipe.label_dropout, batch['label'].shape)
    labels = jnp.where(dropped, -1, batch['label'])
    return update(state, images, labels, model=model, optimizer=optimizer, recipe=recipe)


def jitted_train_step(state: TrainState, mesh: Mesh, model, optimizer, recipe: Recipe):
    """`train_step` compiled for a mesh: a function of (state, batch, key) that takes the state.

    The state, whose arrays may be abstract, stays where it is; metrics are on every device.
    """
    return jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, recipe=recipe),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, state), sharding.replicated(mesh)),
    )


def update(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    *,
    model: TarFlow,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """As `train_step`, on images [B, H, W, C] that have their noise and labels already dropped."""
    gradients = functools.partial(_gradients, parts=recipe.accumulation)
    if model.layout.devices_alone:
        gradients = _each_device_alone(gradients, model.layout.mesh)
        model = model.clone(layout=OneDevice())
    grads, metrics, prior = gradients(state, images, labels, model=model)
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

    finite = jnp.isfinite(metrics['gradient_norm'])  # of one number that is not, neither is this
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

    def mean(*arguments, model):
        one = lambda *local: jax.lax.pmean(gradients(*local, model=model), sharding.BATCH)  # noqa: E731
        specs = (P(), P(sharding.BATCH), P(sharding.BATCH))
        # The kernels' gradients are sums over local images only, which check_vma would average.
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(
            *arguments
        )

    return mean


def _gradients(state: TrainState, images, labels, model: TarFlow, parts: int):
    """Gradient, metrics and moved prior over the batch, worked through in `parts` parts.

    Each is a mean over the images, and hence over the parts.
    """

    def loss_fn(params, images, labels):
        variables = variables_of(params, state.prior)
        sequences, logdet = model.apply(variables, images, labels, method='trajectory')
        loss, terms = likelihood.training_loss(sequences[-1], logdet)
        squares = jnp.stack([jnp.square(x).mean() for x in sequences])
        metrics = {'loss': loss, **terms, 'block_mean_square': squares}
        return loss, (metrics, _moved(state.prior, sequences[-1]))

    def part(images, labels):
        grads, (metrics, prior) = jax.grad(loss_fn, has_aux=True)(state.params, images, labels)
        return grads, metrics, prior

    if parts == 1:
        return part(images, labels)
    # Part i takes every parts-th image: with the batch sharded over devices in runs of
    # consecutive images, each device then finds its share of every part at home.
    split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    shapes = jax.eval_shape(part, split(images)[0], split(labels)[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def accumulate(total, images_and_labels):
        return jax.tree.map(jnp.add, total, part(*images_and_labels)), None

    total, _ = jax.lax.scan(accumulate, zeros, (split(images), split(labels)))
    return jax.tree.map(lambda x: x / parts, total)


def _moved(prior, z):
    """The prior of the next step; None for flows whose prior does not move."""
    if prior is None:
        return None
    return {'variance': likelihood.moved_prior_variance(prior['variance'], z)}
