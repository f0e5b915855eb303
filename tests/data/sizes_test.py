"""Sizes of images as the command line, the manifest and the model have them."""

import pytest

from tarflow_jax.data import sizes


@pytest.mark.parametrize('text, pair, plain', [
    ('64', (64, 64), 64), ('64x64', (64, 64), 64), ('48x32', (48, 32), [48, 32]),
])
def test_forms_of_a_size(text, pair, plain):
    assert sizes.parse(text) == pair
    assert sizes.plain(pair) == plain
    assert sizes.pair(plain) == pair
    assert sizes.parse(sizes.text(pair)) == pair


@pytest.mark.parametrize('given', ['', '0', 'x', '48x', 'x32', '0x3', '3x0', '48x32x3', '-1', '4.5'])
def test_no_size(given):
    with pytest.raises(ValueError, match='nor HEIGHTxWIDTH such as 48x32') as error:
        sizes.parse(given)
    assert str(error.value).startswith(f'{given!r} is not a whole number above 0')
