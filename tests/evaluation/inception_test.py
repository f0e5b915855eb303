"""Inception-v3 against features that torch-fidelity's network gave for the same random weights."""

from pathlib import Path

import jax
import numpy as np
import pytest
from random_networks import random_images, random_inception
from torch_bytes import legacy_state, write_legacy

from tarflow_jax.evaluation.inception import (
    InceptionV3,
    features,
    load_inception,
    prepare,
    resize_like_tensorflow_1,
)

RECORDED = np.load(Path(__file__).parent / 'data' / 'inception.npz')
SIZES = [(32, 32), (64, 64), (300, 400)]


def recorded(what, size):
    return RECORDED[f'{what}_{size[0]}x{size[1]}']


def relative(found, wanted):
    return np.abs(found - wanted).max() / np.abs(wanted).max()


@pytest.fixture(scope='module')
def state():
    return random_inception(0)


@pytest.fixture(scope='module')
def path(state, tmp_path_factory):
    """The weights in a file like the published one: the old format, and a classifier."""
    rest = {'fc.weight': np.zeros((1008, 2048), np.float32), 'fc.bias': np.zeros(1008, np.float32)}
    file = tmp_path_factory.mktemp('weights') / 'inception.pth'
    return write_legacy(file, *legacy_state(state | rest))


@pytest.fixture(scope='module')
def variables(path):
    return load_inception(path)


# Recorded: every 23rd pixel of both axes.
@pytest.mark.parametrize('size', SIZES)
def test_resize(size):
    images = random_images(size).astype(np.float32)
    found = jax.jit(resize_like_tensorflow_1, static_argnums=1)(images, 299)
    assert found.shape == (2, 299, 299, 3) and found.dtype == np.float32
    # A step or two of float32 at 255, where XLA fuses a product and a sum.
    np.testing.assert_allclose(found[0, ::23, ::23], recorded('resized', size), rtol=0, atol=6e-5)


def test_resize_by_hand():
    ramp = np.arange(8, dtype=np.float32).reshape(1, 2, 4, 1)
    # Columns at 0, 4/6, 8/6, 2, 16/6, 20/6; rows at 0, 1/3, 2/3, 1, and the last stays.
    columns = np.array([0, 4 / 6, 8 / 6, 2, 16 / 6, 3])
    rows = np.array([0, 4 / 3, 8 / 3, 4, 4, 4])
    found = resize_like_tensorflow_1(ramp, 6)[0, :, :, 0]
    np.testing.assert_allclose(found, rows[:, None] + columns, rtol=1e-6)
    # Shrinking leaves pixels out; the same size changes nothing.
    np.testing.assert_array_equal(resize_like_tensorflow_1(ramp, 2)[0, :, :, 0], [[0, 2], [4, 6]])
    square = ramp.reshape(2, 2, 2, 1)
    np.testing.assert_array_equal(resize_like_tensorflow_1(square, 2), square)


def test_preparation():
    images = np.array([0, 128, 255], np.uint8).reshape(3, 1, 1, 1).repeat(3, -1)
    prepared = jax.jit(prepare)(images)
    assert prepared.shape == (3, 299, 299, 3)
    wanted = np.broadcast_to(np.array([-1, 0, 127 / 128]).reshape(3, 1, 1, 1), prepared.shape)
    np.testing.assert_array_equal(prepared, wanted)


def test_features_of_torch_fidelity(variables):
    # One compilation for all sizes: the network is the same behind the preparation.
    prepared = np.concatenate([jax.jit(prepare)(random_images(size)) for size in SIZES])
    found = jax.jit(InceptionV3().apply)(variables, prepared)
    assert found['pooled'].shape == (6, 2048) and found['spatial'].shape == (6, 2023)
    assert all(array.dtype == np.float32 for array in found.values())
    for i, size in enumerate(SIZES):
        rows = slice(2 * i, 2 * i + 2)
        for what in ('pooled', 'spatial'):
            wanted = recorded(what, size)
            assert relative(found[what][rows], wanted) < 1e-5
            # Images differ by far more than that, so the numbers show that they were used.
            assert relative(wanted[0], wanted[1]) > 1e-2


def test_features_of_images(variables):
    found = jax.jit(features)(variables, random_images((64, 64)))
    for what in ('pooled', 'spatial'):
        assert relative(found[what], recorded(what, (64, 64))) < 1e-5


def test_batch_norm_is_folded(state, variables):
    layer = 'Mixed_6d.branch7x7_2'
    kernel, bias = (variables['params'][layer][part] for part in ('kernel', 'bias'))
    assert kernel.shape == (1, 7, 160, 160)
    gamma, beta, mean, variance = (
        state[f'{layer}.bn.{part}'][3].astype(np.float64)
        for part in ('weight', 'bias', 'running_mean', 'running_var')
    )
    scale = gamma / np.sqrt(variance + 0.001)
    weight = state[f'{layer}.conv.weight'][3, 5, 0, 2]
    np.testing.assert_allclose(kernel[0, 2, 5, 3], weight * scale, rtol=1e-6)
    np.testing.assert_allclose(bias[3], beta - mean * scale, rtol=1e-6)


def refusal(tmp_path, arrays):
    path = write_legacy(tmp_path / 'weights.pth', *legacy_state(arrays))
    with pytest.raises(ValueError) as error:
        load_inception(path)
    message = str(error.value)
    assert message.startswith(str(path)) and 'InceptionV3' in message and '\n' not in message
    return message


def test_other_weights_are_refused(tmp_path, state):
    first = {name: array for name, array in state.items() if name.startswith('Conv2d_1a')}
    assert "has no tensor 'Conv2d_2a_3x3.conv.weight'" in refusal(tmp_path, first)
    cut = first | {'Conv2d_1a_3x3.bn.weight': first['Conv2d_1a_3x3.bn.weight'][:1]}
    assert "its tensor 'Conv2d_1a_3x3.bn.weight' is float32 (1,) instead of float32 (32,)" in (
        refusal(tmp_path, cut)
    )
    other = {'_conv_stem.weight': np.zeros((32, 3, 3, 3), np.float32)}
    assert "has no tensor 'Conv2d_1a_3x3.conv.weight'" in refusal(tmp_path, other)


def test_unknown_tensors_are_refused(tmp_path, state):
    more = {'head.weight': np.zeros((2, 2), np.float32)}
    assert "has the tensor 'head.weight', which the network does not have" in refusal(
        tmp_path, state | more
    )


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.pth does not exist'):
        load_inception(tmp_path / 'none.pth')
