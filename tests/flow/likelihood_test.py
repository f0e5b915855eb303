"""The density, the loss and its gradient, in closed form and against the official code."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES, ITARFLOW_CASES, case, relative_error
from tiny_flow import apply, batch, perturbed, sequence_flow, tiny

import tarflow_jax as tfj
from tarflow_jax.flow import likelihood
from tarflow_jax.training.corruption import WEIGHTS


def test_log_density_of_a_gaussian_in_closed_form():
    rng = np.random.default_rng(0)
    z, logdet, variance = rng.normal(size=(5, 4, 3)), rng.normal(size=5), rng.uniform(1, 2, (4, 3))
    wanted = logdet - (0.5 * z**2 / variance + 0.5 * np.log(2 * np.pi * variance)).sum((1, 2))
    found = likelihood.latent_log_prob(jnp.float32(z), jnp.float32(logdet), jnp.float32(variance))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize('first_token, free', [('identity', 2), ('start', 1)])
def test_the_density_integrates_to_one(first_token, free):
    # One block on four tokens of one number. The first latents depend on the first numbers alone,
    # so that their part of the density is that of a flow in one or two dimensions: on a grid.
    model = sequence_flow(
        length=4, token_dim=1, width=16, head_dim=16, layers_per_block=(1,), first_token=first_token
    )
    variables = perturbed(model, amount=0.15)
    side = np.linspace(-9, 9, 61)
    grid = np.stack(np.meshgrid(*[side] * free), -1).reshape(-1, free)
    x = jnp.float32(np.pad(grid, ((0, 0), (0, 4 - free)))[..., None])
    z, _ = apply(model, variables, x)
    affine = jax.jit(model.block(0).affine)(variables['params']['block_0'], x)
    log_p = likelihood.latent_log_prob(z[:, :free], -affine.log_scale[:, :free].sum((1, 2)))
    assert abs(np.exp(np.float64(log_p)).sum() * (side[1] - side[0]) ** free - 1) < 1e-3
    assert np.ptp(affine.log_scale[:, 1]) > 0.1
    assert first_token == 'identity' or abs(affine.log_scale[0, 0, 0]) > 0.01


def test_bits_per_dim_of_uniform_pixels_is_eight():
    # The uniform density on [-1, 1]^n is 2^-n: exactly 8 bits for 8-bit pixels.
    num_dims = 48
    assert float(tfj.bits_per_dim(jnp.float32(-num_dims * np.log(2)), num_dims)) == pytest.approx(8)


def test_log_prob_uses_the_prior_variance():
    c = case('vp_cond')
    images, labels = c.images('x'), c.labels()
    z, _ = apply(c.model, c.variables, images, labels)
    variance = np.random.default_rng(0).uniform(0.5, 2, z.shape[1:]).astype(np.float32)
    variables = {**c.variables, 'prior': {'variance': variance}}
    wanted = likelihood.latent_log_prob(z, jnp.zeros(len(z)), variance)
    found = tfj.log_prob(c.model, variables, images, labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(found - tfj.log_prob(c.model, c.variables, images, labels)).min() > 1


def test_moved_prior_variance():
    c = case('vp_cond')
    z, _ = apply(c.model, c.variables, c.images('x'), c.labels())
    found = likelihood.moved_prior_variance(c.variables['prior']['variance'], z)
    assert relative_error(found, c.sequence('prior_variance_after_update')) < 1e-5


def test_the_loss_is_the_sum_of_its_terms():
    model = tiny((1,))
    z, logdet = apply(model, perturbed(model), *batch(model))
    loss, terms = likelihood.training_loss(z, logdet)
    assert float(loss) == pytest.approx(float(terms['prior'] - terms['logdet']), abs=1e-6)
    losses = likelihood.example_losses(z, logdet)
    assert losses.shape == (3,) and float(losses.mean()) == pytest.approx(float(loss), abs=1e-6)
    nats = likelihood.latent_log_prob(z, logdet) / model.num_dims
    np.testing.assert_allclose(losses, -nats - 0.5 * np.log(2 * np.pi), atol=1e-6)


def test_weights_of_the_loss():
    model = tiny((1,))
    z, logdet = apply(model, perturbed(model), *batch(model))
    weight = jnp.array([0.0, 2.0, 0.5])
    loss, terms = likelihood.training_loss(z, logdet, weight)
    losses = likelihood.example_losses(z, logdet)
    assert float(loss) == pytest.approx(float((weight * losses).sum() / 3), rel=1e-5)
    for name, value in likelihood.training_loss(z, logdet)[1].items():
        assert terms[name] == value  # the terms are not weighted


@functools.cache
def recorded_gradient(name):
    """Value, latents, and gradients with respect to images and parameters of the official loss."""
    c = case(name)
    weight = c['t'] if c.model.noise_conditioned else None

    @jax.jit
    def loss(x, params):
        z, logdet = c.model.apply({**c.variables, 'params': params}, x, c.condition())
        return likelihood.training_loss(z, logdet, weight)[0], (z, logdet)

    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        jnp.asarray(c.images('x')), c.variables['params']
    )


@pytest.mark.parametrize('name', CASES)
def test_loss_and_its_gradient(name):
    c, ((value, _), (gradient, _)) = case(name), recorded_gradient(name)
    assert relative_error(value, c['loss']) < 1e-5
    assert relative_error(gradient, c.images('loss_grad_x')) < 1e-4


# Our names, and those of the official reweighting.
OFFICIAL_WEIGHTS = {
    'level': 't', 'level_normalized': 't_norm', 'square': 'sqr_t', 'square_normalized': 'sqr_t_norm',
    'one': 'ones',
}


@pytest.mark.parametrize('name', ITARFLOW_CASES)
class TestWeightedLosses:
    @pytest.mark.parametrize('weight', WEIGHTS)
    def test_value(self, name, weight):
        c, ((_, (z, logdet)), _) = case(name), recorded_gradient(name)
        low, high = c.config['t0'], c.config['t1']
        found, _ = likelihood.training_loss(z, logdet, WEIGHTS[weight](jnp.asarray(c['t']), low, high))
        assert relative_error(found, c[f'loss_{OFFICIAL_WEIGHTS[weight]}']) < 1e-5

    def test_gradient(self, name):
        c, ((value, _), (of_images, of_params)) = case(name), recorded_gradient(name)
        assert relative_error(value, c['loss_t']) < 1e-5
        assert relative_error(of_images, c.images('loss_t_grad_x')) < 1e-4
        squares = sum(jnp.square(x).sum() for x in jax.tree.leaves(of_params))
        assert relative_error(jnp.sqrt(squares), c['loss_t_grad_norm']) < 1e-4
        # torch keeps kernels as [out, in].
        time_mlp = of_params['block_0']['noise_embedding']['mlp_in']['kernel'].T[:64]
        assert relative_error(time_mlp, c['loss_t_grad_time_mlp_0']) < 1e-4
        found = official_norms(of_params)
        wanted = dict(zip(json.loads(str(c['loss_t_grad_names'])), c['loss_t_grad_norms']))
        assert set(found) == set(wanted)
        largest = max(wanted.values())
        for tensor, norm in wanted.items():
            assert abs(found[tensor] - norm) < 1e-4 * norm + 1e-6 * largest, tensor


LAYER = {
    'attention_norm/scale': 'attention.norm.weight', 'attention_norm/bias': 'attention.norm.bias',
    'qkv/kernel': 'attention.qkv.weight', 'qkv/bias': 'attention.qkv.bias',
    'attention_proj/kernel': 'attention.proj.weight', 'attention_proj/bias': 'attention.proj.bias',
    'mlp_norm/scale': 'mlp.norm.weight', 'mlp_norm/bias': 'mlp.norm.bias',
    'mlp_in/kernel': 'mlp.main.0.weight', 'mlp_in/bias': 'mlp.main.0.bias',
    'mlp_out/kernel': 'mlp.main.2.weight', 'mlp_out/bias': 'mlp.main.2.bias',
}
BLOCK = {
    'position_embedding': 'pos_embed', 'class_embedding': 'class_embed',
    'proj_in/kernel': 'proj_in.weight', 'proj_in/bias': 'proj_in.bias',
    'proj_out/kernel': 'proj_out.weight', 'proj_out/bias': 'proj_out.bias',
    'noise_embedding/mlp_in/kernel': 'time_embed.mlp.0.weight',
    'noise_embedding/mlp_in/bias': 'time_embed.mlp.0.bias',
    'noise_embedding/mlp_out/kernel': 'time_embed.mlp.2.weight',
    'noise_embedding/mlp_out/bias': 'time_embed.mlp.2.bias',
}


def official_norms(params) -> dict[str, float]:
    """The norm of each tensor under its official name; a norm does not mind the order of numbers."""
    found = {}
    for path, x in jax.tree.leaves_with_path(params):
        block, *rest = (key.key for key in path)
        start = f'blocks.{block.removeprefix("block_")}'
        if rest[0] == 'layers':
            for i, own in enumerate(x):
                name = f'{start}.head_blocks.{i}.{LAYER["/".join(rest[1:])]}'
                found[name] = float(jnp.linalg.norm(own))
        else:
            found[f'{start}.{BLOCK["/".join(rest)]}'] = float(jnp.linalg.norm(x))
    return found


def test_a_label_out_of_range_is_named():
    model = tiny((1,))
    images, _ = batch(model)
    with pytest.raises(ValueError, match='label 3 is outside 0..2'):
        tfj.log_prob(model, perturbed(model), images, np.array([0, 3, 1]))
