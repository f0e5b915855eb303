"""What the report draws: how many pictures, from which noise, and that they are the sampler's."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_flow import CONDITIONED, perturbed, tiny
from tiny_plan import plan_of

import tarflow_jax as tfj
from tarflow_jax.evaluation.report import samples
from tarflow_jax.flow.condition import rows as condition_rows
from tarflow_jax.flow.guidance import Guidance
from tarflow_jax.training import sharding


def drawer(model, variables=None, *, batch_size=8, **fields):
    variables = perturbed(model) if variables is None else variables
    return samples.Drawer(plan_of(model, **fields), variables, sharding.make_mesh(), batch_size)


@pytest.mark.parametrize('weight', [0.0, 3.0])
def test_pictures_and_their_noise(weight):
    model, key = tiny((1, 1)), jax.random.key(5)
    flow = drawer(model)
    own = Guidance(weight=weight)
    flow = dataclasses.replace(flow, plan=dataclasses.replace(flow.plan, guidance=own))
    found = samples.draw(flow, key, rows=10, columns=4, weights=(1.0, 3.0), steps=5)
    shape = (8, 8, 2)
    assert found['labels'].tolist() == [0, 1, 2]
    assert found['raw'].shape == found['denoised'].shape == (3, 4, *shape)
    assert found['trajectory'].shape == (3, 3, *shape)
    assert list(found['guided']) == [0.0, 1.0, 3.0]
    assert found['between'].shape == (3, 5, *shape)
    assert found['iterations']['calls'].shape == (2, 3)
    assert (found['iterations']['calls'] <= model.num_patches).all()
    assert found['iterations']['round_trip'].max() < 1e-2
    assert found['not_finite'] == 0

    noise = samples.noise_of(key, 3, 4, model)
    labels = np.arange(3).repeat(4).astype(np.int32)
    # The samples have the guidance of the config.
    images = tfj.sample(model, flow.variables, noise, labels, guidance=own)
    clean = tfj.denoise(model, flow.variables, images, labels, noise_std=0.1)
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found['raw'].reshape(-1, *shape), images, **close)
    np.testing.assert_array_equal(found['guided'][weight], found['denoised'][:, 0])
    np.testing.assert_allclose(found['denoised'].reshape(-1, *shape), clean, **close)
    np.testing.assert_array_equal(found['trajectory'][-1], found['raw'][:, 0])
    guided = tfj.sample(
        model, flow.variables, noise[::4], labels[::4], guidance=Guidance(weight=3.0)
    )
    guided = tfj.denoise(model, flow.variables, guided, labels[::4], noise_std=0.1)
    np.testing.assert_allclose(found['guided'][3.0], guided, **close)
    # The ways between samples begin at the first of a row and end at the second.
    np.testing.assert_allclose(found['between'][:, 0], found['denoised'][:, 0], **close)
    np.testing.assert_allclose(found['between'][:, -1], found['denoised'][:, 1], **close)


@pytest.mark.slow
def test_rows_with_features_and_a_noise_level():
    model = tiny((1, 1), **CONDITIONED)
    features = np.random.default_rng(0).standard_normal((2, 2)).astype(np.float32)
    flow = drawer(model, noise='levels', noise_std=0.3, features=features)
    key = jax.random.key(5)
    found = samples.draw(flow, key, rows=3, columns=2, weights=(1.0,), steps=3)
    # A row has one class and one feature vector.
    condition = tfj.Condition(
        np.arange(3).repeat(2).astype(np.int32), np.float32(0.3), features[[0, 0, 1, 1, 0, 0]]
    )
    images = tfj.sample(model, flow.variables, samples.noise_of(key, 3, 2, model), condition)
    clean = tfj.iterative_denoise(
        model, flow.variables, images, condition, levels=flow.plan.denoising.levels
    )
    close = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found['raw'].reshape(images.shape), images, **close)
    np.testing.assert_allclose(found['denoised'].reshape(images.shape), clean, **close)
    np.testing.assert_allclose(found['between'][:, -1], found['denoised'][:, 1], **close)
    assert np.abs(found['guided'][1.0] - found['guided'][0.0]).max() > 1e-4
    # The film goes from the sample to the finished image.
    np.testing.assert_allclose(found['film_levels'], [0.3, 0.2, 0.1, 0.0])
    assert found['film'].shape == (3, 4, *images.shape[1:])
    np.testing.assert_array_equal(found['film'][:, 0], found['raw'][:, 0])
    np.testing.assert_allclose(found['film'][:, -1], found['denoised'][:, 0], **close)
    first = tfj.iterative_denoise(
        model, flow.variables, images[::2], condition_rows(condition, slice(None, None, 2)),
        levels=flow.plan.denoising.levels, return_path=True,
    )
    np.testing.assert_allclose(found['film'], np.swapaxes(first, 0, 1), **close)


def test_unconditional_without_gaussian_noise():
    flow = drawer(tiny(num_classes=0), noise='uniform')
    found = samples.draw(flow, jax.random.key(0), rows=2, columns=1, weights=(0.5,), steps=3)
    assert found['labels'] is None and 'denoised' not in found
    assert found['raw'].shape == (2, 1, 8, 8, 2)
    assert len(found['between']) == 0
    assert found['sweep'].temperature == samples.TEMPERATURE
    assert np.abs(found['guided'][0.5] - found['guided'][0.0]).max() > 1e-4


def test_moments_go_patch_by_patch_from_stage_to_stage():
    model = tiny((1, 1))  # 16 patches; the second block reads them in reverse
    way = np.random.default_rng(0).uniform(-1, 1, (3, 2, 8, 8, 2))
    frames, names = samples.moments(model, way, most=9)
    assert frames.shape == (9, 2, 8, 8, 2) and len(names) == 9
    stages = [samples.own_scale(way[0]), samples.own_scale(way[1]), way[2]]
    np.testing.assert_array_equal(frames[[0, 4, 8]], stages)
    # A quarter of the second block: the last four patches, which are the lowest two rows of pixels.
    np.testing.assert_array_equal(frames[1][:, 6:], stages[1][:, 6:])
    np.testing.assert_array_equal(frames[1][:, :6], stages[0][:, :6])
    np.testing.assert_array_equal(frames[5][:, :2], stages[2][:, :2])
    np.testing.assert_array_equal(frames[5][:, 2:], stages[1][:, 2:])
    assert names[0] == 'noise' and names[5] == 'block 0, 25% of the patches'
    assert len(samples.moments(model, way, most=1)[0]) == 3  # a picture for each block at least


def test_moments_follow_any_order():
    order = np.random.default_rng(1).permutation(16)
    model = tiny((1,)).clone(orders=(tuple(order.tolist()),))
    way = np.stack([np.zeros((1, 8, 8, 2)), np.ones((1, 8, 8, 2))])
    frames, _ = samples.moments(model, way, most=17)
    for step in range(17):
        tokens = np.asarray(model.to_tokens(frames[step]))[0].mean(1)
        assert set(np.flatnonzero(tokens == 1)) == set(order[:step])


def test_what_is_not_finite_is_counted():
    model = tiny()
    variables = jax.tree.map(lambda x: x, perturbed(model))
    kernel = variables['params']['block_0']['proj_out']
    huge = jax.tree.map(lambda x: x * 1e4, kernel)
    params = variables['params'] | {'block_0': variables['params']['block_0'] | {'proj_out': huge}}
    found = samples.draw(
        drawer(model, {**variables, 'params': params}), jax.random.key(0), rows=3, columns=2,
        weights=(), steps=2,
    )
    finite = np.isfinite(found['raw']).all((2, 3, 4))
    assert found['not_finite'] == (~finite).sum() > 0


def test_rows_go_through_the_classes():
    assert samples.row_labels(0, 4) is None
    assert samples.row_labels(3, 10).tolist() == [0, 1, 2]
    assert samples.row_labels(1000, 4).tolist() == [0, 250, 500, 750]


def test_arc_keeps_the_length_of_noise():
    start, end = np.random.default_rng(0).normal(size=(2, 3, 64, 48))
    way = samples.between(start, end, 7)
    np.testing.assert_allclose(way[0], start, atol=1e-6)
    np.testing.assert_allclose(way[-1], end, atol=1e-6)
    lengths = np.linalg.norm(way.reshape(7, 3, -1), axis=2) / np.sqrt(64 * 48)
    np.testing.assert_allclose(lengths, 1, atol=0.05)
    # Equal steps: the same angle from each point to the next.
    unit = way.reshape(7, 3, -1) / np.linalg.norm(way.reshape(7, 3, -1), axis=2, keepdims=True)
    angles = np.arccos((unit[1:] * unit[:-1]).sum(2))
    np.testing.assert_allclose(angles, np.broadcast_to(angles[:1], angles.shape), rtol=0.05)
    np.testing.assert_allclose(samples.between(start, start, 3)[1], start, atol=1e-6)


@pytest.mark.parametrize('guidance, has_labels, temperature', [
    (Guidance(weight=2.0), True, 1.0),
    (Guidance(), False, samples.TEMPERATURE),
    (Guidance(weight=0.2, temperature=0.5), False, 0.5),
])
def test_sweep(guidance, has_labels, temperature):
    found = samples.sweep_guidance(guidance, has_labels)
    assert found.temperature == temperature
    model = tiny((1,), num_classes=3 if has_labels else 0)
    labels = np.arange(2) if has_labels else None
    dataclasses.replace(found, weight=1.0).check(model, labels)
    weights = samples.sweep_weights(guidance, (4.0, 1.0, 0.0))
    assert weights == sorted({0.0, 1.0, 4.0, guidance.weight})
