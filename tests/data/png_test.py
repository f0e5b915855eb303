"""PNG: pixels survive, and damage is seen."""

import numpy as np
import pytest

from tarflow_jax.data.png import read_png, write_png


def picture(shape=(7, 9, 3)):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize('shape', [(7, 9, 3), (9, 7, 1), (1, 1, 3), (1, 5, 1), (5, 1, 3)])
def test_what_is_written_is_read(shape):
    image = picture(shape)
    np.testing.assert_array_equal(read_png(write_png(image)), image)


def test_writes_rows_of_transposed_images():
    image = picture((5, 5, 3)).transpose(1, 0, 2)
    np.testing.assert_array_equal(read_png(write_png(image)), image)


def test_the_bytes_stay_what_they_are():
    # Shards are compared by checksum, so the same pixels must give the same file.
    image = np.zeros((2, 2, 1), np.uint8)
    assert write_png(image)[:33].hex() == (
        '89504e470d0a1a0a' '0000000d49484452' '00000002' '00000002' '0800000000' '57dd52f8'
    )
    assert write_png(image) == write_png(image.copy())


@pytest.mark.parametrize('damage', [
    lambda data: data[:30],
    lambda data: data[:60] + data[70:],
    lambda data: data[:60] + bytes(8) + data[68:],
    lambda data: b'nothing',
])
def test_damage_is_an_error(damage):
    with pytest.raises(OSError):
        read_png(damage(write_png(picture())))
