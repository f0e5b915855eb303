"""The train step: the recorded trajectory, and each thing it does to a batch by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity_cases import Case, relative_error
from tiny_flow import tiny
from tiny_state import random_variables

import tarflow_jax as tfj
from tarflow_jax.training import corruption, sharding, step
from tarflow_jax.training.corruption import WEIGHTS, Recipe
from tarflow_jax.training.optimizer import adamw, learning_rate_schedule
from tarflow_jax.training.state import from_variables
from tarflow_jax.training.step import train_step, update

PLAIN = Recipe(noise_std=0.1, label_dropout=0.1, ema_decay=0.0)
KEY = jax.random.key(3)


MODEL = tiny((1,))


def sgd_state(model=MODEL, ema=False):
    return from_variables(random_variables(model), optax.sgd(1.0), ema=ema)


def images_and_labels(model=MODEL, count=8):
    shape = (count, *model.image_shape)
    return jax.random.normal(jax.random.key(5), shape), jnp.arange(count) % 4 - 1


def pixels_and_labels(count=16, model=MODEL):
    shape = (count, *model.image_shape)
    rng = np.random.default_rng(0)
    return {'image': rng.integers(0, 256, shape, np.uint8), 'label': np.arange(count) % 3}


def largest_difference(tree, other):
    return max(
        float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other))
    )


def recorded_trajectory(name):
    """Losses and gradient norms over the recorded steps, final parameters, and the case."""
    case = Case(name, 'initial.pth')
    schedule = learning_rate_schedule(
        peak=float(case['peak_lr']),
        floor=float(case['min_lr']),
        warmup_steps=int(case['warmup_steps']),
        total_steps=int(case['total_steps']),
    )
    optimizer = adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=1e-4, clip_norm=0.0)
    state = from_variables(case.variables, optimizer, ema=False)
    step_fn = jax.jit(
        functools.partial(update, model=case.model, optimizer=optimizer, recipe=PLAIN)
    )
    losses, norms = [], []
    for k, (images, labels) in enumerate(zip(case.images('x'), case.labels('y'))):
        condition, weight = labels, None
        if case.model.noise_conditioned:
            condition = tfj.Condition(labels, noise_std=case['t'][k])
            weight = WEIGHTS['level'](case['t'][k], None, None)
        state, metrics = step_fn(state, images, condition, weight)
        losses.append(float(metrics['loss']))
        norms.append(float(metrics['gradient_norm']))
        assert metrics['block_mean_square'].shape == (2,)
    return np.array(losses), np.array(norms), state.params, case


def test_trajectory_of_the_official_code(record_property):
    losses, _, params, case = recorded_trajectory('trajectory')
    deviation = np.abs(losses / case['loss'] - 1).max()
    record_property('largest relative deviation of the loss', float(deviation))
    assert deviation < 1e-4

    final = Case('trajectory', 'final.pth').variables['params']
    initial = case.variables['params']
    of_values = jax.tree.leaves(jax.tree.map(relative_error, params, final))
    record_property('largest deviation of a parameter over its tensor', max(of_values))
    assert max(of_values) < 1e-3
    # Over the change of each tensor. The bias of the keys (1 of q, k, v) is left out: softmax
    # cancels it, and AdamW makes steps out of what rounding leaves of its gradient.
    of_changes = []
    for path, before in jax.tree.leaves_with_path(initial):
        after, wanted = (functools.reduce(lambda t, k: t[k.key], path, t) for t in (params, final))
        moved, wanted = np.asarray(after) - before, wanted - before
        if path[-2].key == 'qkv' and path[-1].key == 'bias':
            moved, wanted = moved[:, ::2], wanted[:, ::2]
        of_changes.append(relative_error(moved, wanted))
    record_property('largest deviation of a change over its tensor', max(of_changes))
    assert max(of_changes) < 1e-3


def test_trajectory_of_the_official_noise_conditioned_code(record_property):
    losses, norms, params, case = recorded_trajectory('itarflow_trajectory')
    # Over the largest loss, as the losses pass through zero.
    deviation = relative_error(losses, case['loss'])
    record_property('largest deviation of the loss', deviation)
    assert deviation < 1e-4
    deviation = np.abs(norms / case['gradient_norm'] - 1).max()
    record_property('largest relative deviation of the gradient norm', float(deviation))
    assert deviation < 1e-4
    final = Case('itarflow_trajectory', 'final.pth').variables['params']
    deviation = max(jax.tree.leaves(jax.tree.map(relative_error, params, final)))
    record_property('largest deviation of a parameter over its tensor', deviation)
    assert deviation < 1e-3
    assert relative_error(case.variables['params']['block_0']['noise_embedding']['mlp_in']['kernel'],
                          final['block_0']['noise_embedding']['mlp_in']['kernel']) > 1e-2


@functools.cache
def after_update(parts=1):
    """State and metrics after an update by SGD of rate 1, which subtracts the gradient."""
    recipe = Recipe(ema_decay=0.0, accumulation=parts)
    step_fn = jax.jit(
        functools.partial(update, model=MODEL, optimizer=optax.sgd(1.0), recipe=recipe)
    )
    return step_fn(sgd_state(), *images_and_labels())


@pytest.mark.parametrize('parts', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_accumulation_changes_nothing(parts):
    assert largest_difference(after_update(1), after_update(parts)) < 1e-5
    assert largest_difference(after_update(1)[0].params, sgd_state().params) > 1e-2


def given_to_update(monkeypatch, batch, recipe, key=KEY, number=0, model=MODEL):
    """What train_step makes of a batch: images with noise, condition with parts dropped, weight."""
    monkeypatch.setattr(step, 'update', lambda state, *given, **_: given)
    state = sgd_state()._replace(step=jnp.asarray(number, jnp.int32))
    return train_step(state, batch, key, model=model, optimizer=None, recipe=recipe)


@pytest.mark.parametrize('rate', [0.0, 0.1, 0.6])
def test_label_dropout_rate(monkeypatch, rate):
    batch = pixels_and_labels(4000)
    _, condition, weight = given_to_update(monkeypatch, batch, Recipe(label_dropout=rate))
    assert condition.features is condition.noise_std is weight is None
    labels = condition.labels
    dropped = np.asarray(labels) == -1
    # Four standard deviations of a fraction of 4000.
    assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 4000)
    np.testing.assert_array_equal(labels[~dropped], batch['label'][~dropped])


def test_gaussian_noise(monkeypatch):
    batch = pixels_and_labels(500)
    images, *_ = given_to_update(monkeypatch, batch, Recipe(noise_std=0.2))
    noise = np.asarray(images) - (batch['image'] / 127.5 - 1)
    assert abs(noise.mean()) < 4 * 0.2 / np.sqrt(noise.size)
    assert abs(noise.std() - 0.2) < 0.2 * 4 / np.sqrt(2 * noise.size)
    neighbours = np.corrcoef(noise.ravel()[:-1], noise.ravel()[1:])[0, 1]
    assert abs(neighbours) < 4 / np.sqrt(noise.size)


def test_uniform_noise_stays_inside_of_its_pixel_value(monkeypatch):
    batch = pixels_and_labels(500)
    images, *_ = given_to_update(monkeypatch, batch, Recipe(noise='uniform'))
    u = (np.asarray(images, np.float64) + 1) * 128 - batch['image']
    assert -1e-4 <= u.min() < 0.01 and 0.99 < u.max() <= 1 + 1e-4
    assert abs(u.mean() - 0.5) < 4 * np.sqrt(1 / 12 / u.size)
    assert abs(u.std() - np.sqrt(1 / 12)) < 0.005


def test_features_are_dropped_with_the_labels_and_noise_levels_never(monkeypatch):
    model = MODEL.clone(num_features=2, noise_conditioned=True)
    batch = pixels_and_labels(300)
    batch['features'] = np.random.default_rng(1).standard_normal((300, 2)).astype(np.float32)
    recipe = Recipe(noise='levels', noise_std=0.5, label_dropout=0.3)
    images, condition, weight = given_to_update(monkeypatch, batch, recipe, model=model)
    dropped = np.asarray(condition.labels) == -1
    assert 0 < dropped.sum() < 300
    np.testing.assert_array_equal(np.isnan(condition.features), dropped[:, None].repeat(2, 1))
    np.testing.assert_array_equal(condition.features[~dropped], batch['features'][~dropped])
    levels = np.asarray(condition.noise_std)
    assert np.isfinite(levels).all() and np.unique(levels).size == 300
    np.testing.assert_array_equal(weight, levels)
    found = (np.asarray(images) - (batch['image'] / 127.5 - 1)).reshape(300, -1).std(1)
    np.testing.assert_allclose(found / levels, 1, atol=5 / np.sqrt(2 * 128))


@pytest.mark.parametrize('noise', corruption.NOISES)
def test_noise_is_a_function_of_key_and_step(monkeypatch, noise):
    batch = pixels_and_labels()
    recipe = Recipe(noise=noise, label_dropout=0.5)
    make = functools.partial(given_to_update, monkeypatch, batch, recipe)
    images, condition, weight = make(number=4)
    labels = condition.labels
    again, condition_again, weight_again = make(number=4)
    np.testing.assert_array_equal(images, again)
    np.testing.assert_array_equal(labels, condition_again.labels)
    assert (weight is None) == (noise != 'levels')
    jax.tree.map(np.testing.assert_array_equal, weight, weight_again)
    assert np.abs(images - make(number=5)[0]).max() > 1e-3
    assert np.abs(images - make(number=4, key=jax.random.key(4))[0]).max() > 1e-3
    assert any((labels != make(number=n)[1].labels).any() for n in range(5, 8))


def test_average_of_the_parameters():
    recipe = Recipe(ema_decay=0.15)
    images, labels = images_and_labels()
    state = sgd_state(ema=True)
    step_fn = jax.jit(
        functools.partial(update, model=MODEL, optimizer=optax.sgd(0.2), recipe=recipe)
    )
    average = np.asarray(state.params['block_0']['proj_out']['kernel'], np.float64)
    for decay in (0.1, 0.15, 0.15):  # (1 + k) / (10 + k) is 0.1, 0.18, 0.25
        state, _ = step_fn(state, images, labels)
        now = np.asarray(state.params['block_0']['proj_out']['kernel'], np.float64)
        average = decay * average + (1 - decay) * now
        found = np.asarray(state.ema_params['block_0']['proj_out']['kernel'])
        np.testing.assert_allclose(found, average, rtol=1e-5, atol=1e-6)
    assert np.abs(average - now).max() > 1e-3
    assert state.variables()['params'] is state.ema_params


@pytest.mark.parametrize('parts', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_prior_variance_moves_as_in_the_official_code(parts):
    case = Case('vp_cond')
    # Neither the gradient nor the decay may touch it.
    optimizer = adamw(lambda k: 0.1, weight_decay=0.9)
    state = from_variables(case.variables, optimizer, ema=False)
    recipe = Recipe(ema_decay=0.0, accumulation=parts)
    step_fn = jax.jit(
        functools.partial(update, model=case.model, optimizer=optimizer, recipe=recipe)
    )
    after, _ = step_fn(state, case.images('x'), case.labels('y'))
    wanted = case.sequence('prior_variance_after_update')
    assert relative_error(after.prior['variance'], wanted) < 1e-5
    assert relative_error(state.prior['variance'], wanted) > 1e-3


def test_metrics():
    state, metrics = after_update()
    assert set(metrics) == {
        'loss', 'prior', 'logdet', 'block_mean_square', 'gradient_norm', 'skipped'
    }
    assert int(state.step) == 1
    np.testing.assert_allclose(
        metrics['loss'], metrics['prior'] - metrics['logdet'], rtol=1e-5, atol=1e-6
    )
    assert abs(metrics['logdet']) > 1e-3
    # The last block's output is z, and the prior term half of its mean square.
    assert metrics['block_mean_square'].shape == (1,)
    np.testing.assert_allclose(metrics['block_mean_square'][-1], 2 * metrics['prior'], rtol=1e-5)


@pytest.mark.parametrize('parts', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_gradient_that_is_not_finite_changes_nothing(parts):
    model = tiny((1,), volume_preserving=True)
    optimizer = adamw(lambda k: 0.1, clip_norm=1.0)
    recipe = Recipe(ema_decay=0.9, accumulation=parts)
    step_fn = jax.jit(functools.partial(update, model=model, optimizer=optimizer, recipe=recipe))
    state = from_variables(random_variables(model), optimizer, ema=True)
    images, labels = images_and_labels(model)
    broken = images.at[3, 2, 1, 0].set(jnp.nan)

    good, metrics = step_fn(state, images, labels)
    assert int(metrics['skipped']) == int(good.skipped) == 0
    same, metrics = step_fn(good, broken, labels)
    assert not np.isfinite(metrics['gradient_norm']) and int(metrics['skipped']) == 1
    assert int(same.step) == 2 and int(same.skipped) == 1
    unchanged = same._replace(step=good.step, skipped=good.skipped)
    jax.tree.map(np.testing.assert_array_equal, unchanged, good)
    # It goes on as if the step had not been, but for its number.
    after, metrics = step_fn(same, images, labels)
    assert int(metrics['skipped']) == 1 and int(after.step) == 3
    wanted, _ = step_fn(good, images, labels)
    assert largest_difference(after.params, wanted.params) == 0
    assert largest_difference(after.params, good.params) > 1e-3


def test_the_loss_of_an_example_counts_by_its_weight():
    images, labels = images_and_labels()
    weight = np.linspace(0.1, 2.0, 8).astype(np.float32)
    step_fn = functools.partial(
        update, model=MODEL, optimizer=optax.sgd(1.0), recipe=Recipe(ema_decay=0.0)
    )
    nats = tfj.log_prob(MODEL, sgd_state().variables(), images, labels) / MODEL.num_dims
    wanted = (weight * (-np.asarray(nats, np.float64) - 0.5 * np.log(2 * np.pi))).mean()
    state, metrics = jax.jit(step_fn)(sgd_state(), images, labels, weight)
    np.testing.assert_allclose(metrics['loss'], wanted, rtol=1e-5, atol=1e-6)
    # The terms are not weighted, and an example of weight 0 has no part in the gradient.
    np.testing.assert_allclose(metrics['logdet'], after_update()[1]['logdet'], rtol=1e-5)
    alone = jax.jit(step_fn)(sgd_state(), images[:4], labels[:4])[0]
    twice = jax.jit(step_fn)(sgd_state(), images, labels, jnp.float32([2.0] * 4 + [0.0] * 4))[0]
    assert largest_difference(alone.params, twice.params) < 1e-5


def test_loss_is_that_of_the_likelihood():
    images, labels = images_and_labels()
    nats = tfj.log_prob(MODEL, sgd_state().variables(), images, labels).mean() / MODEL.num_dims
    wanted = -float(nats) - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(after_update()[1]['loss'], wanted, rtol=1e-5, atol=1e-6)


def test_gradient_norm_is_taken_before_clipping():
    gradient = jax.tree.map(jnp.subtract, sgd_state().params, after_update()[0].params)
    wanted = optax.global_norm(gradient)
    assert wanted > 0.1
    optimizer = adamw(lambda k: 0.1, clip_norm=0.01)
    state = from_variables(random_variables(MODEL), optimizer, ema=False)
    step_fn = jax.jit(functools.partial(update, model=MODEL, optimizer=optimizer, recipe=PLAIN))
    state, metrics = step_fn(state, *images_and_labels())
    np.testing.assert_allclose(metrics['gradient_norm'], wanted, rtol=1e-4)
    first_moments = state.opt_state[1][0].mu
    np.testing.assert_allclose(optax.global_norm(first_moments), 0.1 * 0.01, rtol=1e-4)


@pytest.mark.parametrize('alone', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('parts', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eight_devices_compute_what_one_does(parts, alone):
    # With a layout each device takes its gradients alone, without it XLA's partitioner decides.
    model = tiny((1,), volume_preserving=parts == 2)
    recipe = Recipe(noise_std=0.1, label_dropout=0.3, ema_decay=0.9, accumulation=parts)
    optimizer = optax.sgd(0.1, momentum=0.9)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh(devices=devices)
        state = from_variables(random_variables(model), optimizer, ema=True)
        state = jax.device_put(state, sharding.replicated(mesh))
        laid_out = model.clone(layout=sharding.Layout(mesh)) if alone else model
        step_fn = jax.jit(
            functools.partial(train_step, model=laid_out, optimizer=optimizer, recipe=recipe)
        )
        all_metrics = []
        batch = pixels_and_labels()
        batch = sharding.to_devices(batch, mesh, len(batch['label']))
        for _ in range(4):
            state, metrics = step_fn(state, batch, KEY)
            all_metrics.append(metrics)
        results.append(jax.device_get((state, all_metrics)))
        assert len(state.params['block_0']['proj_in']['kernel'].sharding.device_set) == len(devices)
    assert len(jax.devices()) == 8
    assert largest_difference(results[0], results[1]) < 1e-5
    assert largest_difference(results[0][0].params, random_variables(model)['params']) > 1e-3
