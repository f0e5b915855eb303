import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_cases import CASES, Case, relative_error
from tiny_flow import apply, batch, perturbed, tiny

import tarflow_jax as tfj
from tarflow_jax.flow import likelihood
from tarflow_jax.flow.model import patchify, unpatchify


@pytest.mark.parametrize('name', CASES)
class TestParity:
    def test_latents_and_log_determinant(self, name):
        case = Case(name)
        z, logdet = apply(case.model, case.variables, case.images('x'), case.labels())
        assert relative_error(z, case.sequence('z')) < 1e-5
        per_dimension = logdet / case.model.num_dims
        if case.model.volume_preserving:
            assert np.abs(per_dimension).max() == 0
        else:
            assert relative_error(per_dimension, case['logdet']) < 1e-5

    def test_every_block(self, name):
        case = Case(name)
        sequences, _ = apply(case.model, case.variables, case.images('x'), case.labels(), method='trajectory')
        for i, x in enumerate(sequences):
            assert relative_error(x, case.sequence(f'block_{i}')) < 1e-5

    def test_dropped_labels(self, name):
        case = Case(name)
        if 'y_drop' not in case:
            pytest.skip('the case has no classes')
        labels = case.labels('y_drop')
        assert (labels < 0).any()
        z, logdet = apply(case.model, case.variables, case.images('x'), labels)
        assert relative_error(z, case.sequence('drop_z')) < 1e-5
        assert np.abs(logdet / case.model.num_dims - case['drop_logdet']).max() < 1e-6

    def test_loss_and_its_gradient(self, name):
        case = Case(name)

        def loss(x):
            return likelihood.training_loss(*apply(case.model, case.variables, x, case.labels()))[0]

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(case.images('x')))
        assert relative_error(value, case['loss']) < 1e-5
        assert relative_error(gradient, case.images('loss_grad_x')) < 1e-4


@pytest.mark.parametrize('volume_preserving', [False, True])
def test_log_determinant_is_that_of_the_jacobian(volume_preserving):
    with jax.enable_x64(True):
        model = tiny(
            (1, 2, 1), image_size=4, dtype=jnp.float64, volume_preserving=volume_preserving
        )
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), perturbed(model, amount=0.08))
        images, labels = batch(model)
        images = images.astype(jnp.float64)
        _, logdet = apply(model, variables, images, labels)
        assert logdet.dtype == jnp.float64

        def latent(x, label):
            return model.apply(variables, x[None], label[None])[0].ravel()

        jacobian = jax.jit(jax.vmap(jax.jacrev(latent)))(images, labels)
        jacobian = np.asarray(jacobian).reshape(len(images), model.num_dims, model.num_dims)
        wanted = np.linalg.slogdet(jacobian)[1]
        assert np.abs(logdet - wanted).max() < 1e-8
        assert volume_preserving or np.abs(wanted).min() > 1


def test_both_modes_of_differentiation_agree():
    model = tiny()
    variables, (images, labels) = perturbed(model), batch(model)

    def log_density(x):
        return tfj.log_prob(model, variables, x, labels).sum()

    direction = jax.random.normal(jax.random.key(1), images.shape)
    forward = jax.jit(lambda x, v: jax.jvp(log_density, (x,), (v,))[1])(images, direction)
    reverse = (jax.jit(jax.grad(log_density))(images) * direction).sum()
    assert float(forward) == pytest.approx(float(reverse), rel=1e-4)


@pytest.mark.parametrize('reverse', [False, True])
def test_a_block_looks_only_at_earlier_patches(reverse):
    model = tiny()
    params = perturbed(model)['params']['block_0']
    block = model.block_module(0)
    x = jax.random.normal(jax.random.key(1), (1, model.num_patches, model.patch_dim))

    def outputs(x):
        return jnp.stack(block.apply({'params': params}, x, jnp.array([1]), reverse))[:, 0]

    # [output, position, d, 1, input position, d'] -> does position t depend on position s?
    jacobian = np.abs(jax.jit(jax.jacrev(outputs))(x)[:, :, :, 0]).sum((0, 2, 4))
    assert np.array_equal(jacobian > 0, np.tril(np.ones_like(jacobian), -1) > 0)


def test_it_starts_near_the_identity():
    # proj_out's kernel is zero: all that is left is its bias, within 1/sqrt(width).
    model = tiny()
    images, labels = batch(model)
    variables = jax.jit(model.init)(jax.random.key(0), images, labels)
    for block in variables['params'].values():
        assert not block['proj_out']['kernel'].any()
        assert 0.1 < np.abs(block['proj_out']['bias']).max() <= model.width**-0.5
        assert 0.005 < block['position_embedding'].std() < 0.02
        kernel = np.asarray(block['layers']['mlp_out']['kernel'])
        assert 0.95 / np.sqrt(128) < np.abs(kernel).max() <= 1 / np.sqrt(128)


def test_labels_below_zero_and_none_are_the_class_mean():
    model = tiny()
    variables = perturbed(model)
    images, _ = batch(model)
    none, _ = apply(model, variables, images, None)
    minus, _ = apply(model, variables, images, jnp.full(3, -1))
    known, _ = apply(model, variables, images, jnp.zeros(3, int))
    np.testing.assert_array_equal(none, minus)
    assert np.abs(none - known).max() > 1e-3


def test_a_label_past_the_last_class_is_nan_not_another_class():
    model = tiny()
    images, _ = batch(model)
    z, _ = apply(model, perturbed(model), images, jnp.array([0, 1, 3]))
    assert np.isfinite(z[:2]).all() and not np.isfinite(z[2]).all()


def test_an_unconditional_flow_ignores_labels():
    model = tiny(num_classes=0)
    variables = perturbed(model)
    images, labels = batch(model)
    np.testing.assert_array_equal(
        apply(model, variables, images, labels)[0], apply(model, variables, images)[0]
    )


@pytest.mark.parametrize('fields', [{'remat': 'layer'}, {'remat': 'attention'}, {'remat': 'dots'}, {'unroll': 2}])
def test_rematerialisation_and_unrolling_change_nothing(fields):
    images, labels = batch(tiny())
    variables = perturbed(tiny())

    def loss_and_gradient(model):
        def loss(params):
            z, logdet = apply(model, {'params': params}, images, labels)
            return likelihood.training_loss(z, logdet)[0]

        return jax.jit(jax.value_and_grad(loss))(variables['params'])

    (value, gradient), (wanted, wanted_gradient) = (
        loss_and_gradient(tiny(**fields)),
        loss_and_gradient(tiny()),
    )
    assert abs(value - wanted) < 1e-6
    for found, right in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient)):
        np.testing.assert_allclose(found, right, atol=2e-6)


def test_products_that_the_backward_pass_makes_again():
    def products(remat):
        model = tiny(remat=remat)
        loss = lambda variables: apply(model, variables, *batch(model))[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(perturbed(model))).count('= dot_general[')

    blocks = len(tiny().layers_per_block)  # each with a loop over its layers, seen once
    # Of the 8 products of a layer the last is never needed again, and that of probabilities and
    # values makes what 'attention' keeps.
    assert products('layer') - products('none') == 7 * blocks
    assert products('attention') - products('none') == 6 * blocks


def test_bfloat16_computes_narrow_and_accounts_wide():
    model = tiny(dtype=jnp.bfloat16)
    variables = perturbed(model)
    images, labels = batch(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    z, logdet = apply(model, variables, images, labels)
    wanted, wanted_logdet = apply(tiny(), variables, images, labels)
    assert z.dtype == logdet.dtype == jnp.float32
    assert 1e-5 < relative_error(z, wanted) < 0.03
    assert relative_error(logdet, wanted_logdet) < 0.03
    hlo = jax.jit(model.apply).lower(variables, images, labels).as_text()
    dots = [line for line in hlo.splitlines() if 'dot_general' in line]
    assert dots and all('bf16' in line.split(':')[-1].split('->')[0] for line in dots)


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
    assert model.block_module(0) != model.block_module(1)
    assert tiny(layers_per_block=(2, 2)).block_module(0) == tiny().block_module(0)


def test_patches_are_in_raster_order_and_row_column_channel_inside():
    images = jnp.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3)
    patches = patchify(images, 2)
    assert patches.shape == (2, 4, 12)
    np.testing.assert_array_equal(patches[1, 1], images[1, :2, 2:].ravel())
    np.testing.assert_array_equal(patches[1, 2], images[1, 2:, :2].ravel())
    np.testing.assert_array_equal(unpatchify(patches, 2, 4), images)


@pytest.mark.parametrize(
    'fields, words',
    [
        ({'patch_size': 3}, ['image_size 8', 'patch_size 3']),
        ({'width': 40}, ['width 40', 'head_dim 16', '32']),
        ({'layers_per_block': ()}, ['layers_per_block ()']),
        ({'layers_per_block': (2, 0)}, ['layers_per_block (2, 0)']),
        ({'num_classes': -1}, ['num_classes -1']),
        ({'remat': 'all'}, ["remat 'all'", 'layer']),
    ],
)
def test_fields_that_do_not_fit(fields, words):
    with pytest.raises(ValueError) as error:
        tiny(**fields)
    assert all(word in str(error.value) for word in words)


def test_images_of_another_shape():
    model = tiny()
    with pytest.raises(ValueError, match=r'\(3, 8, 8, 1\).*8, 8, 2'):
        apply(model, perturbed(model), jnp.zeros((3, 8, 8, 1)))
