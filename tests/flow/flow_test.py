"""The flows: the official numbers, the log-determinant, what fields and examples may be."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES, ITARFLOW_CASES, case, relative_error
from tiny_flow import (
    CONDITIONED,
    PERMUTED,
    apply,
    batch,
    condition_for,
    noise_for,
    normal,
    perturbed,
    sequence_flow,
    tiny,
    wide,
)

import tarflow_jax as tfj
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.condition import drop
from tarflow_jax.flow.flow import architecture, field_defaults
from tarflow_jax.flow.patches import patchify, unpatchify


@functools.cache
def recorded_forward(name):
    """What the official code is compared with: output of every block, and logdet per dimension."""
    c = case(name)
    sequences, logdet = apply(c.model, c.variables, c.images('x'), c.condition(), method='trajectory')
    return sequences, logdet / c.model.num_dims


@pytest.mark.parametrize('name', CASES + ITARFLOW_CASES)
class TestParity:
    def test_latents_and_log_determinant(self, name):
        c, (sequences, logdet) = case(name), recorded_forward(name)
        assert relative_error(sequences[-1], c.sequence('z')) < 1e-5
        if c.model.volume_preserving:
            assert np.abs(logdet).max() == 0
        else:
            assert relative_error(logdet, c['logdet']) < 1e-5

    def test_every_block(self, name):
        c, (sequences, _) = case(name), recorded_forward(name)
        assert len(sequences) == len(c.model.layers_per_block)
        for i, x in enumerate(sequences):
            assert relative_error(x, c.sequence(f'block_{i}')) < 1e-5
        if 'norms' in c:
            before = [patchify(c.images('x'), c.model.patch_size), *sequences]
            for i, (x, y) in enumerate(zip(before, sequences)):
                assert relative_error(jnp.square(y).mean((1, 2)), c['norms'][:, i]) < 1e-5
                assert relative_error(jnp.square(y - x).mean((1, 2)), c['residuals'][:, i]) < 1e-5


@pytest.mark.parametrize('name, kind', [
    ('cond_gray', 'drop'), ('vp_cond', 'drop'), ('itarflow_cond_rgb', 'drop'),
    ('itarflow_cond_rgb', 'none'),
])
def test_labels_that_are_missing_in_the_official_code(name, kind):
    c = case(name)
    if kind == 'drop':
        assert (c['y_drop'] < 0).any()
        condition = c.condition('y_drop')
    else:  # as -1 for all, which has the same program
        condition = drop(c.condition(), jnp.ones(4, bool))
    sequences, logdet = apply(c.model, c.variables, c.images('x'), condition, method='trajectory')
    assert relative_error(sequences[-1], c.sequence(f'{kind}_z')) < 1e-5
    assert np.abs(logdet / c.model.num_dims - c[f'{kind}_logdet']).max() < 1e-6


def check_log_determinant(model, condition):
    """Against the Jacobian's, in float64, operation by operation: nothing is compiled as a whole,
    and flows share the compiled operations."""
    variables = wide(perturbed(model, amount=0.2))
    x, condition = wide(normal(7, 3, *model.example_shape)), wide(condition)
    latent, tangent, logdet = jax.linearize(
        lambda x: model.apply(variables, x, condition), x, has_aux=True
    )
    n = model.num_dims
    directions = jnp.broadcast_to(jnp.eye(n)[:, None], (n, 3, n)).reshape(n, *x.shape)
    jacobian = jax.vmap(tangent)(directions).reshape(n, 3, n).transpose(1, 2, 0)
    wanted = np.linalg.slogdet(jacobian)[1]
    assert logdet.dtype == latent.dtype == jnp.float64
    np.testing.assert_allclose(logdet, wanted, rtol=0, atol=1e-8)
    return wanted


KINDS = {
    'none': {},
    'labels': {'num_classes': 3},
    'noise': {'noise_conditioned': True},
    'features': {'num_features': 2},
    'token features': {'num_features': 2},
    'all': CONDITIONED,
}


@pytest.mark.parametrize('orders', ['alternate', PERMUTED], ids=['alternate', 'permuted'])
@pytest.mark.parametrize('first_token', ['identity', 'start'])
@pytest.mark.parametrize('scale, limit', itertools.product(('exp', 'softplus'), (None, 0.7)))
def test_log_determinant_is_that_of_the_jacobian(scale, limit, first_token, orders):
    found = {}
    with jax.enable_x64(True), jax.disable_jit():
        for kind, fields in KINDS.items():
            model = sequence_flow(
                dtype=jnp.float64, scale=scale, scale_limit=limit, first_token=first_token,
                orders=orders, **fields,
            )
            condition = condition_for(model, per_token=kind in ('token features', 'all'))
            found[kind] = check_log_determinant(model, condition)
    assert min(abs(x).max() for x in found.values()) > 0.1
    assert abs(found['features'] - found['token features'])[1:].min() > 1e-3


@pytest.mark.parametrize('volume_preserving', [False, True])
def test_log_determinant_of_images_and_of_deeper_blocks(volume_preserving):
    with jax.enable_x64(True), jax.disable_jit():
        model = tfj.TarFlow(
            image_size=(4, 2), image_channels=1, patch_size=(1, 2), width=8, head_dim=4,
            layers_per_block=(1, 2, 1), num_classes=3, dtype=jnp.float64,
            volume_preserving=volume_preserving,
        )
        wanted = check_log_determinant(model, jnp.array([0, 2, -1]))
    assert abs(wanted).max() < 1e-12 if volume_preserving else abs(wanted).min() > 0.01


def test_both_modes_of_differentiation_agree():
    model = sequence_flow(num_classes=3)
    variables, (x, labels) = perturbed(model), batch(model)

    def log_density(x):
        return tfj.log_prob(model, variables, x, labels).sum()

    direction = noise_for(model)
    forward = jax.jit(lambda x, v: jax.jvp(log_density, (x,), (v,))[1])(x, direction)
    reverse = (jax.jit(jax.grad(log_density))(x) * direction).sum()
    assert float(forward) == pytest.approx(float(reverse), rel=1e-4)


def test_labels_below_zero_and_none_are_the_class_mean():
    model = tiny((1,))
    variables, (images, _) = perturbed(model), batch(model)
    none, _ = apply(model, variables, images, None)
    minus, _ = apply(model, variables, images, jnp.full(3, -1))
    known, _ = apply(model, variables, images, jnp.zeros(3, int))
    np.testing.assert_allclose(none, minus, rtol=1e-5, atol=1e-6)
    assert np.abs(none - known).max() > 1e-3


def test_a_label_past_the_last_class_is_nan_not_another_class():
    model = tiny((1,))
    images, _ = batch(model)
    z, _ = apply(model, perturbed(model), images, jnp.array([0, 1, 3]))
    assert np.isfinite(z[:2]).all() and not np.isfinite(z[2]).all()


def test_an_unconditional_flow_ignores_labels():
    model = tiny((1,), num_classes=0)
    variables, (images, labels) = perturbed(model), batch(model)
    np.testing.assert_array_equal(
        apply(model, variables, images, labels)[0], apply(model, variables, images)[0]
    )


@functools.cache
def loss_and_gradient(**fields):
    model = sequence_flow(layers_per_block=(2,), num_classes=3, **fields)
    x, labels = batch(model)

    def loss(params):
        return likelihood.training_loss(*model.apply({'params': params}, x, labels))[0]

    return jax.jit(jax.value_and_grad(loss))(perturbed(sequence_flow(layers_per_block=(2,), num_classes=3))['params'])


@pytest.mark.parametrize('fields', [{'remat': 'layer'}, {'remat': 'attention'}, {'remat': 'dots'}, {'unroll': 2}])
def test_rematerialisation_and_unrolling_change_nothing(fields):
    value, gradient = loss_and_gradient(**fields)
    wanted, wanted_gradient = loss_and_gradient()
    assert abs(value - wanted) < 1e-6
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient)):
        np.testing.assert_allclose(found, right, atol=2e-6)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_products_that_the_backward_pass_makes_again(dtype):
    def products(remat):
        model = tiny(remat=remat, dtype=dtype)
        loss = lambda variables: apply(model, variables, *batch(model))[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(perturbed(model))).count('= dot_general[')

    blocks = len(tiny().layers_per_block)  # each with a loop over its layers, seen once
    # Of the 8 products of a layer the last is never needed again, and that of probabilities and
    # values makes what 'attention' keeps.
    assert products('layer') - products('none') == 7 * blocks
    assert products('attention') - products('none') == 6 * blocks
    # Those of attention, which are not between an activation and a parameter.
    assert products('dots') - products('none') == 2 * blocks


def test_bfloat16_computes_narrow_and_accounts_wide():
    model = tiny((1,), dtype=jnp.bfloat16)
    variables, (images, labels) = perturbed(model), batch(model)
    z, logdet = apply(model, variables, images, labels)
    wanted, wanted_logdet = apply(tiny((1,)), variables, images, labels)
    assert z.dtype == logdet.dtype == jnp.float32
    assert 1e-5 < relative_error(z, wanted) < 0.03
    assert relative_error(logdet, wanted_logdet) < 0.03
    hlo = jax.jit(model.apply).lower(variables, images, labels).as_text()
    dots = [line for line in hlo.splitlines() if 'dot_general' in line]
    assert dots and all('bf16' in line.split(':')[-1].split('->')[0] for line in dots)


def test_a_float32_residual_stream_rounds_less():
    images, labels = batch(tiny((6,)))
    variables = perturbed(tiny((6,)))
    wanted, _ = apply(tiny((6,)), variables, images, labels)

    def error(residual_dtype, dtype=jnp.bfloat16):
        model = tiny((6,), dtype=dtype, residual_dtype=residual_dtype)
        z, _ = apply(model, variables, images, labels)
        again = tfj.sample(model, variables, z, labels)
        assert np.abs(again - images).max() < 0.2
        return relative_error(z, wanted)

    assert error(None) == error(jnp.bfloat16)
    assert 1e-4 < error(jnp.float32) < 0.7 * error(jnp.bfloat16)
    assert error(jnp.bfloat16, dtype=jnp.float32) == 0  # no narrower than the products


def test_parameters_are_float32_whatever_the_dtype():
    model = tiny((1,), dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}


def test_the_program_does_not_grow_with_depth():
    def size(depth):
        model = tiny(layers_per_block=(depth,))
        images, labels = batch(model)
        variables = jax.eval_shape(model.init, jax.random.key(0), images)

        def loss(variables):
            return likelihood.training_loss(*apply(model, variables, images, labels))[0]

        return len(jax.jit(jax.grad(loss)).lower(variables).as_text().splitlines())

    assert size(12) == size(3)


def test_block_depths_may_differ():
    model = tiny(layers_per_block=(1, 3, 2))
    depths = [b['layers']['qkv']['kernel'].shape[0] for b in perturbed(model)['params'].values()]
    assert depths == [1, 3, 2]
    assert model.block(0) != model.block(1)
    assert tiny(layers_per_block=(2, 2)).block(0) == tiny().block(0)


def test_patches_are_in_raster_order_and_row_column_channel_inside():
    images = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 4, 12)
    np.testing.assert_array_equal(patches[1, 1], images[1, :2, 2:].ravel())
    np.testing.assert_array_equal(patches[1, 2], images[1, 2:, :2].ravel())
    np.testing.assert_array_equal(unpatchify(patches, 2, 4), images)


def test_rectangular_images_and_patches():
    images = jnp.arange(2 * 6 * 4 * 3).reshape(2, 6, 4, 3)
    patches = patchify(images, (3, 2))
    assert patches.shape == (2, 4, 18)
    np.testing.assert_array_equal(patches[1, 1], images[1, :3, 2:].ravel())
    np.testing.assert_array_equal(patches[1, 2], images[1, 3:, :2].ravel())
    np.testing.assert_array_equal(unpatchify(patches, (3, 2), (6, 4)), images)
    model = tiny((1,), image_size=(6, 4), patch_size=(3, 2))
    assert model.image_shape == (6, 4, 2) and model.patch_shape == (3, 2)
    assert (model.num_patches, model.patch_dim) == model.token_shape == (4, 12)
    variables, (x, labels) = perturbed(model), batch(model)
    z, _ = apply(model, variables, x, labels)
    found = tfj.sample(model, variables, z, labels)
    assert found.shape == (3, 6, 4, 2)
    np.testing.assert_allclose(found, x, atol=1e-5)


def test_equal_sides_are_one_number():
    assert tiny(image_size=(8, 8), patch_size=(2, 2)) == tiny()
    assert tiny(image_size=[8, 4]) == tiny(image_size=(8, 4))


def test_one_token_with_a_start_token_is_an_affine_map_by_the_condition():
    model = sequence_flow(length=1, first_token='start', num_classes=3)
    variables, (x, labels) = perturbed(model, amount=0.3), batch(model)
    z, logdet = apply(model, variables, x, labels)
    shifted, same = apply(model, variables, x + 1, labels)
    np.testing.assert_allclose(logdet, same, rtol=1e-5)
    assert abs(logdet).min() > 1e-3 and abs(logdet[0] - logdet[1]) > 1e-3
    np.testing.assert_allclose(tfj.sample(model, variables, z, labels), x, atol=1e-5)


def test_orders_as_arrays_and_permutations_that_are_alternate():
    model = sequence_flow(orders=np.array(PERMUTED))
    assert model == sequence_flow(orders=PERMUTED) and hash(model)
    alternate = sequence_flow(orders=(range(4), range(3, -1, -1)))
    x, variables = noise_for(model), perturbed(sequence_flow())
    np.testing.assert_array_equal(
        apply(alternate, variables, x)[0], apply(sequence_flow(), variables, x)[0]
    )


@pytest.mark.parametrize('fields, wanted', [
    ({}, {'HIGHEST'}), ({'precision': 'high'}, {'HIGH'}), ({'dtype': jnp.bfloat16}, set()),
])
def test_precision_of_every_product(fields, wanted):
    model = sequence_flow(**fields)
    x, variables = noise_for(model), perturbed(sequence_flow())
    for function in (tfj.log_prob, tfj.sample):
        program = str(jax.make_jaxpr(lambda x, f=function: f(model, variables, x))(x))
        assert 'dot_general' in program
        assert set(re.findall(r'Precision\.(\w+)', program)) == wanted


def test_architecture_is_what_the_function_depends_on():
    model = sequence_flow(orders=PERMUTED, dtype=jnp.bfloat16, remat='layer')
    found = architecture(model)
    assert found['orders'] == [list(order) for order in PERMUTED] and found['length'] == 4
    assert found == architecture(sequence_flow(orders=PERMUTED, unroll=2))
    assert found == architecture(sequence_flow(orders=PERMUTED, precision='default'))
    assert found != architecture(sequence_flow())
    assert field_defaults(model)['first_token'] == 'identity'
    assert set(field_defaults(model)) == set(found) - {
        'length', 'token_dim', 'width', 'layers_per_block'
    }


@pytest.mark.parametrize(
    'make, fields, words',
    [
        (tiny, {'patch_size': 3}, ['image_size 8', 'patch_size 3']),
        (tiny, {'image_size': (48, 32), 'patch_size': (3, 5)}, ['image_size (48, 32)', 'patch_size (3, 5)', 'divides']),
        (tiny, {'image_size': (8, 8, 2)}, ['image_size (8, 8, 2)', '(height, width)']),
        (tiny, {'patch_size': (2.0, 2)}, ['patch_size (2.0, 2)', '(height, width)']),
        (tiny, {'image_size': 0}, ['image_size 0']),
        (tiny, {'patch_size': 0}, ['patch_size 0']),
        (tiny, {'image_channels': 0}, ['image_channels 0 must be positive']),
        (tiny, {'image_size': 2}, ['1 token', "first_token='start'", 'smaller patches']),
        (sequence_flow, {'length': 1}, ['1 token', "'identity'", "first_token='start'"]),
        (sequence_flow, {'length': 0}, ['length 0 and token_dim 2', 'at least 1']),
        (sequence_flow, {'token_dim': 0}, ['length 4 and token_dim 0', 'at least 1']),
        (tiny, {'width': 40}, ['width 40', 'head_dim 16', '32']),
        (tiny, {'width': 0}, ['width 0']),
        (tiny, {'head_dim': 0}, ['head_dim 0']),
        (sequence_flow, {'width': 7, 'head_dim': 7, 'noise_conditioned': True}, ['width 7', 'even']),
        (tiny, {'layers_per_block': ()}, ['layers_per_block ()']),
        (tiny, {'layers_per_block': (2, 0)}, ['layers_per_block (2, 0)']),
        (tiny, {'num_classes': -1}, ['num_classes -1']),
        (tiny, {'num_features': -1}, ['num_features -1', 'must not be negative']),
        (tiny, {'remat': 'all'}, ["remat 'all'", 'layer']),
        (sequence_flow, {'precision': 'low'}, ["precision 'low' must be one of highest, high"]),
        (sequence_flow, {'scale': 'tanh'}, ["scale 'tanh' must be one of exp, softplus"]),
        (sequence_flow, {'scale_limit': 0}, ['scale_limit 0', 'above 0', 'None']),
        (sequence_flow, {'scale_limit': -1.0}, ['scale_limit -1.0']),
        (sequence_flow, {'scale_limit': float('nan')}, ['scale_limit nan', 'finite']),
        (sequence_flow, {'scale_limit': float('inf')}, ['scale_limit inf']),
        (sequence_flow, {'first_token': 'mask'}, ["first_token 'mask' must be one of identity, start"]),
        (sequence_flow, {'orders': 'raster'}, ["orders 'raster'", "'alternate'"]),
        (sequence_flow, {'orders': ((0, 1, 2, 3),)}, ['orders for 1 blocks', '2 blocks']),
        (sequence_flow, {'orders': ((0, 1, 2, 3), (0, 1, 2))}, ['orders[1]', '4 tokens']),
        (sequence_flow, {'orders': ((0, 1, 2, 2), (0, 1, 2, 3))}, ['orders[0]', 'permutation']),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else '',
)
def test_fields_that_do_not_fit(make, fields, words):
    with pytest.raises(ValueError) as error:
        make(**fields)
    message = str(error.value)
    assert all(word in message for word in words), message
    assert '\n' not in message and message.endswith('.')


class TestExamples:
    model, sequences = tiny((1,)), sequence_flow()

    @pytest.mark.parametrize('call', [
        lambda model, x: model.apply(perturbed(model), x),
        lambda model, x: tfj.log_prob(model, perturbed(model), x),
        lambda model, x: tfj.denoise(model, perturbed(model), x, noise_std=0.1),
    ], ids=['apply', 'log_prob', 'denoise'])
    def test_of_another_shape_or_type(self, call):
        with pytest.raises(ValueError, match=r'\(3, 8, 8, 1\).*8, 8, 2'):
            call(self.model, jnp.zeros((3, 8, 8, 1)))
        with pytest.raises(ValueError, match=r'\(8, 8, 2\); this flow takes \[B, 8, 8, 2\]'):
            call(self.model, jnp.zeros((8, 8, 2)))
        for dtype in (np.uint8, np.int32):
            with pytest.raises(ValueError, match=r'float32 in \[-1, 1\], such as images / 127.5 - 1'):
                call(self.model, np.zeros((3, 8, 8, 2), dtype))
        with pytest.raises(ValueError, match='examples are int32; pass float32'):
            call(self.sequences, np.zeros((3, 4, 2), np.int32))

    def test_far_outside_of_the_range_is_warned_about_but_inside_jit(self):
        variables, pixels = perturbed(self.model), 255 * jnp.ones((1, 8, 8, 2))
        with pytest.warns(UserWarning, match=r'images reach 255, far outside \[-1, 1\]') as found:
            tfj.log_prob(self.model, variables, pixels)
        assert len(found) == 1 and 'images / 127.5 - 1' in str(found[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            apply(self.model, variables, pixels)
            tfj.log_prob(self.model, variables, 4.0 * pixels / 255)
            tfj.log_prob(self.sequences, perturbed(self.sequences), 255 * jnp.ones((1, 4, 2)))
