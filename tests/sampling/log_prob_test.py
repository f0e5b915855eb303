"""Samples with their density: all methods against each other, `log_prob`, and brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import (
    CONDITIONED,
    PERMUTED,
    apply,
    condition_for,
    noise_for,
    normal,
    perturbed,
    sequence_flow,
    wide,
)

import tarflow_jax as tfj
from tarflow_jax.flow.condition import drop, rows
from tarflow_jax.flow.order import reorder
from tarflow_jax.sampling.noise import noise_of_examples
from tarflow_jax.sampling.schedule import BlockSchedule

FLOW = sequence_flow(
    length=6, first_token='start', scale='softplus', orders=((2, 0, 3, 5, 1, 4), (1, 2, 0, 5, 3, 4)),
    **CONDITIONED,
)
CONDITION, NOISE = condition_for(FLOW), noise_for(FLOW)
VARIABLES = perturbed(FLOW, amount=0.15)
MIXED = tfj.Schedule((BlockSchedule(0), BlockSchedule(2, 1e-6)))
METHODS = {
    'sequential': {}, 'jacobi': {'tolerance': 1e-7}, 'gs_jacobi': {'tolerance': 1e-7, 'segments': 2},
    'auto': {'schedule': MIXED},
}
GUIDANCES = {
    'unguided': None,
    'linear': tfj.Guidance(0.6, annealed=True, temperature=0.7),
    'linear_sigma': tfj.Guidance(4.0, rule='linear_sigma'),
    'starflow': tfj.Guidance(2.0, rule='starflow'),
    'one block': tfj.Guidance(4.0, rule='linear_sigma', blocks=1),
}


def draw(method, guidance=None, noise=NOISE, **more):
    return tfj.sample(
        FLOW, VARIABLES, noise, CONDITION, method=method, guidance=guidance,
        return_log_prob=True, **METHODS[method], **more,
    )


@pytest.mark.parametrize('name', GUIDANCES)
def test_all_decoders_agree_on_samples_and_densities(name):
    guidance = GUIDANCES[name]
    x, log_prob, info = draw('sequential', guidance, return_info=True)
    # The guided flow, all tokens at once, makes the noise of them again.
    assert info.round_trip.max() < 1e-4 and info.residual.max() < 1e-4
    for method in ('jacobi', 'gs_jacobi', 'auto'):
        found, found_log_prob = draw(method, guidance)
        np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found_log_prob, log_prob, atol=1e-3)
    if guidance is None:
        np.testing.assert_allclose(apply(FLOW, VARIABLES, x, CONDITION)[0], NOISE, atol=1e-4)
        wanted = tfj.log_prob(FLOW, VARIABLES, x, CONDITION)
        np.testing.assert_allclose(log_prob, wanted, atol=1e-3)
    else:  # it does something to each example that has what guidance drops
        plain, _ = draw('sequential')
        assert abs(x - plain).max((1, 2))[1:].min() > 0.05
    if name == 'linear_sigma':  # scales below zero are followed, too
        assert negative_scales(FLOW, VARIABLES, x, CONDITION, guidance)


def test_guidance_of_fewer_blocks_is_another():
    samples = [draw('sequential', GUIDANCES[name])[0] for name in ('linear_sigma', 'one block')]
    assert abs(samples[0] - samples[1])[1:].max() > 0.05


BRUTE = {
    **{k: v for k, v in GUIDANCES.items() if k != 'unguided'},
    'negative': tfj.Guidance(30.0, rule='linear_sigma'),
    'log_scale': tfj.Guidance(1.5, target='log_scale', rule='linear_sigma'),
    'shift': tfj.Guidance(1.5, target='shift'),
    'unguided': None,
}


STEP, STENCIL = 1e-3, {1: 45, 2: -9, 3: 1}  # of central differences of sixth order


def jacobian(draw, noise):
    """Of noise [T, D] to samples, [T D, T D], by differences; in float64 ten digits are right."""
    n = noise.size
    steps = jnp.array([sign * k * STEP for k in STENCIL for sign in (1, -1)])
    moved = noise + (steps[:, None, None] * jnp.eye(n)).reshape(-1, *noise.shape)
    ahead, behind = jnp.moveaxis(draw(moved).reshape(3, 2, n, n), 1, 0)
    factors = jnp.array(list(STENCIL.values())) / (60 * STEP)
    return jnp.einsum('k,kij->ji', factors, ahead - behind)


@pytest.mark.parametrize('name, fields', [
    *((name, {'first_token': 'start', 'orders': PERMUTED, **CONDITIONED}) for name in BRUTE),
    *((name, {'volume_preserving': True, 'num_classes': 3}) for name in ('unguided', 'linear')),
], ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_density_of_samples_by_brute_force(name, fields):
    # log N(z) minus the log-determinant of the Jacobian of noise to sample.
    with jax.enable_x64(True):
        model = sequence_flow(dtype=jnp.float64, scale_limit=0.7, **fields)
        variables, condition = wide(perturbed(model, amount=0.2)), wide(condition_for(model))
        if model.volume_preserving:
            variables['prior'] = {'variance': 0.5 + jnp.square(wide(normal(1, 4, 2)))}
        noise, guidance = wide(noise_for(model)), BRUTE[name]
        x, log_prob = tfj.sample(
            model, variables, noise, condition, guidance=guidance, return_log_prob=True
        )
        for i in (1, 2):  # the first has nothing that guidance drops
            def draw(moved, i=i):
                alike = rows(condition, np.full(len(moved), i))
                return tfj.sample(model, variables, moved, alike, guidance=guidance)

            logdet = np.linalg.slogdet(jacobian(draw, noise[i]))[1]
            wanted = -0.5 * (noise[i] ** 2 + np.log(2 * np.pi)).sum() - logdet
            assert float(log_prob[i]) == pytest.approx(float(wanted), abs=1e-8)
        if name == 'negative':
            assert negative_scales(model, variables, x, condition, guidance)


def negative_scales(model, variables, x, condition, guidance) -> bool:
    """Whether any guided scale of block 0 is below zero."""
    block, params, order = model.block(0), variables['params']['block_0'], model.block_orders()[0]
    x = reorder(x, order)
    c, u = (
        jnp.exp(block.affine(params, x, given, order).log_scale)
        for given in (condition, drop(condition, jnp.ones(len(x), bool)))
    )
    return bool((c + guidance.weight * (c - u) < 0).any())


def test_density_of_a_volume_preserving_flow():
    model = sequence_flow(volume_preserving=True)
    variables = perturbed(model) | {'prior': {'variance': 0.5 + jnp.square(normal(1, 4, 2))}}
    x, log_prob = tfj.sample(model, variables, noise_for(model), return_log_prob=True)
    np.testing.assert_allclose(log_prob, tfj.log_prob(model, variables, x), rtol=1e-5)


def test_samples_drawn_again_have_the_density_of_their_new_noise():
    key, noise = jax.random.key(9), NOISE.at[1].set(jnp.inf)
    clean = draw('sequential')[1]
    x, log_prob, info = draw('sequential', noise=noise, key=key, return_info=True)
    np.testing.assert_array_equal(info.redraws, [0, 1, 0])
    wanted = tfj.log_prob(FLOW, VARIABLES, x, CONDITION)
    np.testing.assert_allclose(log_prob, wanted, atol=1e-3)
    np.testing.assert_allclose(log_prob[::2], clean[::2], atol=1e-5)
    assert abs(log_prob[1] - clean[1]) > 0.1
    fresh = noise_of_examples(FLOW, key, jnp.array([1]), 0)
    z, _ = apply(FLOW, VARIABLES, x, CONDITION)
    np.testing.assert_allclose(z[1], fresh[0], atol=1e-4)
    # Without a key they are not drawn again, and have none.
    assert not np.isfinite(draw('sequential', noise=noise)[1][1])


def test_samples_that_do_not_converge_have_the_density_of_sequential_ones():
    limited = tfj.Schedule((BlockSchedule(1, 0.0, max_iterations=1),) * 2)
    x, log_prob, info = tfj.sample(
        FLOW, VARIABLES, NOISE, CONDITION, method='auto', schedule=limited, return_log_prob=True,
        return_info=True,
    )
    assert info.sequential.all()
    wanted, wanted_log_prob = draw('sequential')
    np.testing.assert_allclose(x, wanted, atol=1e-5)
    np.testing.assert_allclose(log_prob, wanted_log_prob, atol=1e-4)


def test_inside_jit_and_its_gradient():
    @jax.jit
    def log_prob(noise):
        return tfj.sample(FLOW, VARIABLES, noise, CONDITION, return_log_prob=True)[1]

    np.testing.assert_allclose(log_prob(NOISE), draw('sequential')[1], atol=1e-4)
    direction = noise_for(FLOW, key=8)
    slope = (jax.jit(jax.grad(lambda z: log_prob(z).sum()))(NOISE) * direction).sum()
    low, high = (log_prob(NOISE + s * direction).sum() for s in (-1e-2, 1e-2))
    np.testing.assert_allclose(slope, (high - low) / 2e-2, rtol=2e-2)


def test_what_is_returned():
    alone = tfj.sample(FLOW, VARIABLES, NOISE, CONDITION)
    assert alone.shape == NOISE.shape
    with_info = tfj.sample(FLOW, VARIABLES, NOISE, CONDITION, return_info=True)
    assert isinstance(with_info[1], tfj.SampleInfo) and len(with_info) == 2
    x, log_prob, info = draw('sequential', return_info=True)
    assert log_prob.shape == (3,) and isinstance(info, tfj.SampleInfo)
    np.testing.assert_array_equal(x, alone)
