import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES, Case, relative_error
from tiny_flow import apply, batch, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.flow import likelihood


def test_log_density_of_a_gaussian_in_closed_form():
    rng = np.random.default_rng(0)
    z, logdet, variance = rng.normal(size=(5, 4, 3)), rng.normal(size=5), rng.uniform(1, 2, (4, 3))
    wanted = logdet - (0.5 * z**2 / variance + 0.5 * np.log(2 * np.pi * variance)).sum((1, 2))
    found = likelihood.latent_log_prob(jnp.float32(z), jnp.float32(logdet), jnp.float32(variance))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_density_integrates_to_one():
    # One block on four patches of one pixel. The first two latents depend on the first two pixels
    # alone, so that their part of the density is that of a flow in two dimensions: on a grid.
    model = tfj.TarFlow(
        image_size=2, image_channels=1, patch_size=1, width=16, head_dim=16, layers_per_block=(1,)
    )
    variables = perturbed(model, amount=0.15)
    side = np.linspace(-9, 9, 61)
    first_two = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2)
    x = jnp.float32(np.pad(first_two, ((0, 0), (0, 2)))[..., None])
    z, _ = apply(model, variables, x.reshape(-1, 2, 2, 1))
    log_scale, _ = model.block_module(0).apply({'params': variables['params']['block_0']}, x)
    log_p = likelihood.latent_log_prob(z[:, :2], -log_scale[:, :2].sum((1, 2)))
    assert abs(np.exp(np.float64(log_p)).sum() * (side[1] - side[0]) ** 2 - 1) < 1e-3
    assert np.ptp(log_scale[:, 1]) > 0.1


def test_bits_per_dim_of_uniform_pixels_is_eight():
    # The uniform density on [-1, 1]^n is 2^-n: exactly 8 bits for 8-bit pixels.
    num_dims = 48
    assert float(tfj.bits_per_dim(jnp.float32(-num_dims * np.log(2)), num_dims)) == pytest.approx(8)


def test_log_prob_uses_the_prior_variance():
    case = Case('vp_cond')
    images, labels = case.images('x'), case.labels()
    z, _ = apply(case.model, case.variables, images, labels)
    variance = np.random.default_rng(0).uniform(0.5, 2, z.shape[1:]).astype(np.float32)
    variables = {**case.variables, 'prior': {'variance': variance}}
    wanted = likelihood.latent_log_prob(z, jnp.zeros(len(z)), variance)
    found = tfj.log_prob(case.model, variables, images, labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(found - tfj.log_prob(case.model, case.variables, images, labels)).min() > 1


def test_moved_prior_variance():
    case = Case('vp_cond')
    z, _ = apply(case.model, case.variables, case.images('x'), case.labels())
    found = likelihood.moved_prior_variance(case.variables['prior']['variance'], z)
    assert relative_error(found, case.sequence('prior_variance_after_update')) < 1e-5


def test_the_loss_is_the_sum_of_its_terms():
    model = tiny()
    z, logdet = apply(model, perturbed(model), *batch(model))
    loss, terms = likelihood.training_loss(z, logdet)
    assert float(loss) == pytest.approx(float(terms['prior'] - terms['logdet']), abs=1e-6)


@pytest.mark.parametrize('name', CASES)
def test_denoising_agrees_with_the_official_code(name):
    case = Case(name)
    # The official code denoises volume-preserving flows under the unit prior.
    variables = jax.tree.map(np.array, case.variables)
    if 'prior' in variables:
        variables['prior']['variance'][:] = 1
    found = tfj.denoise(
        case.model, variables, case.images('x'), case.labels(),
        noise_std=float(case['denoise_sigma']),
    )
    assert relative_error(found, case.images('denoised')) < 1e-4


def test_denoising_strength_scales_the_step():
    model = tiny()
    variables, (images, labels) = perturbed(model), batch(model)
    step = lambda s: tfj.denoise(  # noqa: E731
        model, variables, images, labels, noise_std=0.1, strength=s) - images
    np.testing.assert_allclose(step(1.4), 1.4 * step(1.0), atol=1e-6)
    assert np.abs(step(1.0)).max() > 1e-3


def test_dequantisation_fills_the_cells_of_the_pixel_values():
    pixels = np.repeat(np.array([0, 100, 255], np.uint8), 2000).reshape(3, -1, 1, 1)
    x = np.asarray(likelihood.dequantise(jax.random.key(0), pixels), np.float64)
    for value, cell in zip((0, 100, 255), x):
        u = (cell + 1) * 128 - value
        assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1
        assert abs(u.mean() - 0.5) < 0.03
    assert -1 <= x.min() and x.max() < 1


def test_unit_range_has_both_ends():
    found = likelihood.to_unit_range(np.array([0, 51, 255], np.uint8))
    np.testing.assert_allclose(found, [-1, -0.6, 1], atol=1e-6)


def test_gaussian_noise_has_the_given_standard_deviation():
    noisy = likelihood.add_gaussian_noise(jax.random.key(0), jnp.ones((100, 10, 10, 1)), 0.07)
    assert float(noisy.mean()) == pytest.approx(1, abs=0.003)
    assert float(noisy.std()) == pytest.approx(0.07, rel=0.03)


def test_a_label_out_of_range_is_named():
    model = tiny()
    images, _ = batch(model)
    with pytest.raises(ValueError, match='label 3 is outside 0..2'):
        tfj.log_prob(model, perturbed(model), images, np.array([0, 3, 1]))
