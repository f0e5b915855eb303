"""Each rule makes the pixels of the suite that it is named after."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from tarflow_jax.data import cropping

# Recorded from center-crop of NVlabs/edm's dataset_tool.py and from openai/guided-diffusion's
# center_crop_arr: the pixels of ramp(height, width) made size x size.
RECORDED = [
    ('edm', 1, 1, 4, '17b0761f87b081d5'),
    ('edm', 375, 500, 64, '5cf5541ca0153fff'),
    ('edm', 500, 333, 64, 'b3cbdcc84f4a8325'),
    ('edm', 64, 65, 64, '8ab26ad90af5644c'),
    ('edm', 13, 700, 16, 'b255ea15df86d91b'),
    ('edm', 257, 129, 32, 'd6cdc55abecf6e0b'),
    ('edm', 31, 33, 64, 'fd2ab58a1b1e579b'),
    ('edm', 128, 129, 64, '5cfbb0b7d174de34'),
    ('edm', 127, 400, 64, '7af719ef8243427b'),
    ('adm', 1, 1, 4, '17b0761f87b081d5'),
    ('adm', 375, 500, 64, '747140c9f1d9f4dc'),
    ('adm', 500, 333, 64, '7a403162c9522398'),
    ('adm', 64, 65, 64, '8ab26ad90af5644c'),
    ('adm', 13, 700, 16, '18a3cf1dea5cebb0'),
    ('adm', 257, 129, 32, '727cbbf06935869d'),
    ('adm', 31, 33, 64, '14aaaf043b0fd367'),
    ('adm', 128, 129, 64, 'd37ca7921de39635'),
    ('adm', 127, 400, 64, 'b1799b260c94ba3e'),
]


def ramp(height, width):
    """A deterministic image without symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 37 + y * 11, x * x + y * 5, x * y + 3 * y], -1).astype(np.uint8)


@pytest.mark.parametrize('rule, height, width, size, digest', RECORDED)
def test_pixels_are_those_of_the_suites(rule, height, width, size, digest):
    made = cropping.resize_and_crop(Image.fromarray(ramp(height, width)), (size, size), rule)
    assert made.size == (size, size)
    assert hashlib.sha256(np.asarray(made).tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize('rule', ['torchvision', 'adm'])
def test_what_would_become_too_large_is_refused(rule):
    with pytest.raises(cropping.BadImage, match='is 1x60000, which is too elongated'):
        cropping.resize_and_crop(Image.new('L', (1, 60000)), (64, 64), rule)


def test_descriptions_name_the_filter():
    for rule, word in (('torchvision', 'bilinear'), ('edm', 'Lanczos'), ('adm', 'bicubic')):
        assert word in cropping.describe((64, 64), rule) and '64x64' in cropping.describe((64, 64), rule)
