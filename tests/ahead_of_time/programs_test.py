import pytest

from tarflow_jax.ahead_of_time import hlo
from tarflow_jax.ahead_of_time.programs import splash_cost

LOGITS = 12 * 1024 * 1024 * 64  # multiplications of one product over whole heads


def call(results, name):
    text = f"""HloModule m

ENTRY %main (p: f32[]) -> f32[] {{
  %p = f32[] parameter(0)
  ROOT %k = ({results}) custom-call(%p), custom_call_target="tpu", metadata={{op_name="jit(f)/{name}"}}
}}
"""
    return hlo.parse(text).computations['main'].root


@pytest.mark.parametrize('batch, images', [('', 1), ('3,', 3)])
def test_splash_kernels_count_the_tiles_below_the_diagonal(batch, images):
    out = f'bf16[{batch}12,1024,64]'
    forward = call(f'f32[512,128], f32[512,64], {out}, f32[{batch}12,1024,128]', 'splash_mha_fwd')
    backward = call(f'f32[512,64], bf16[{batch}2,12,1024,64], {out}, {out}', 'splash_mha_dkv')
    # Two tiles of 512: three of four are on or below. A last axis of 64 takes what 128 would.
    wanted = 2 * 2 * LOGITS * images * 3 / 4
    assert splash_cost(forward) == (wanted, 2 * wanted, 0.0)
    assert splash_cost(backward) == (2.5 * wanted, 5 * wanted, 0.0)


def test_other_calls_are_not_splash_kernels():
    assert splash_cost(call("f32[512,128]", "whole_head_attention")) is None
