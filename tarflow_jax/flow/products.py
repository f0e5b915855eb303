"""Matrix products: their precision, and the derivative of bfloat16 ones."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# A TPU multiplies float32 matrices in six, three or one passes of bfloat16. On GPU, 'high' and
# 'default' allow TF32. A CPU always multiplies in float32.
PRECISIONS = ('highest', 'high', 'default')


def at_least_float32(dtype: DTypeLike) -> np.dtype:
    """Promotes narrower types to float32; keeps float64, which the tests differentiate in."""
    return jnp.promote_types(dtype, jnp.float32)


def product(subscripts: str, a: jax.Array, b: jax.Array, precision: str = 'highest') -> jax.Array:
    """Computes an einsum of two arrays of one dtype, with the result in float32 or wider.

    Args:
      subscripts: such as 'ij,jk->ik'. Each letter is in two of the three terms or in all.
      precision: one of PRECISIONS, for float32; narrower types are multiplied as they are.
    """
    if a.dtype == at_least_float32(a.dtype):
        # At default precision, TPUs (bfloat16) and GPUs (TF32) round float32 operands, which would
        # cost the likelihood several digits.
        return jnp.einsum(subscripts, a, b, precision=precision)
    return _narrow_product(subscripts, a, b)


# The transpose rule of JAX multiplies the float32 cotangent of the result with a bfloat16 operand.
# CPUs and GPUs compute this in float32, at a fraction of the speed. So the cotangent is rounded
# first, as the official code's autocast does. A TPU would round it in the product.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _forward(subscripts, a, b):
    return _narrow_product(subscripts, a, b), (a, b)


def _backward(subscripts, operands, cotangent):
    a, b = operands
    left, right, out = re.split(',|->', subscripts)
    cotangent = cotangent.astype(a.dtype)
    a_bar = _narrow_product(f'{out},{right}->{left}', cotangent, b)
    b_bar = _narrow_product(f'{left},{out}->{right}', a, cotangent)
    return a_bar.astype(a.dtype), b_bar.astype(b.dtype)


_narrow_product.defvjp(_forward, _backward)
