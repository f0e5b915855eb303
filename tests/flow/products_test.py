"""Matrix products: values and gradients against float64, and the types that are multiplied."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_flow import tiny

from tarflow_jax.flow.products import product

CASES = {
    'ij,jk->ik': ((5, 3), (3, 4)),
    'abcj,jns->abcns': ((3, 2, 4, 5), (5, 2, 3)),
    'bhst,bhtk->bhsk': ((2, 3, 4, 4), (2, 3, 4, 5)),
}


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])
@pytest.mark.parametrize('subscripts', CASES)
def test_value_and_gradients(subscripts, dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in CASES[subscripts])
    out, pull = jax.vjp(lambda a, b: product(subscripts, a, b), a, b)
    cotangent = jnp.asarray(rng.standard_normal(out.shape), dtype).astype(jnp.float32)
    exact = [np.asarray(x, np.float64) for x in (a, b, cotangent)]
    left, right, result = re.split(',|->', subscripts)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, np.einsum(subscripts, *exact[:2]), rtol=1e-5, atol=1e-6)
    a_bar, b_bar = pull(cotangent)
    assert a_bar.dtype == b_bar.dtype == dtype
    expected = np.einsum(f'{result},{right}->{left}', exact[2], exact[1])
    np.testing.assert_allclose(np.float32(a_bar), expected, rtol=tolerance, atol=1e-6)
    expected = np.einsum(f'{left},{result}->{right}', exact[0], exact[2])
    np.testing.assert_allclose(np.float32(b_bar), expected, rtol=tolerance, atol=1e-6)


def test_all_products_of_a_bfloat16_train_step_have_bfloat16_operands():
    model = tiny((1,), dtype=jnp.bfloat16, residual_dtype=jnp.float32)
    images = np.zeros((2, *model.image_shape), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    loss = lambda variables: model.apply(variables, images)[0].sum()  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(variables).as_text()
    types = re.findall(r'dot_general.*: \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>', text)
    # Forward: queries, keys, values, logits, mixture, projection, two of the MLP, in and out. Each
    # has two products in the backward pass, but the first has no gradient of its images.
    assert types == [('bf16', 'bf16', 'f32')] * (3 * 10 - 1), types
