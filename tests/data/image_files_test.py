"""Resizing agrees with torchvision's, and what is wrong with a file is said."""

import hashlib
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tarflow_jax.data import image_files
from tarflow_jax.data.image_files import Form
from tarflow_jax.data.listing import UNREADABLE, File
from tarflow_jax.data.png import read_png

# Recorded from torchvision 0.28: the pixels of CenterCrop(size)(Resize(size)(ramp(height, width))).
TORCHVISION = [
    (1, 1, 4, '17b0761f87b081d5'),
    (375, 500, 64, '339cf78b6fe25fff'),
    (500, 333, 64, '56e9fcdcc18167e1'),
    (64, 65, 64, '8ab26ad90af5644c'),
    (67, 64, 64, '534b481550d159d4'),
    (13, 700, 16, '099de1a78ff0f16c'),
    (257, 129, 32, '73f214e659c670c6'),
    (31, 33, 64, '5aefd39580f82b70'),
]


def encode(path, size=(8, 8), exact=False, **more):
    file = File(path.name, str(path), 0, path.stat().st_size)
    encoded, = image_files.encode_files([file], Form(size, exact, **more))
    return encoded


def ramp(height, width):
    """A deterministic image without symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 37 + y * 11, x * x + y * 5, x * y + 3 * y], -1).astype(np.uint8)


@pytest.mark.parametrize('height, width, size, digest', TORCHVISION)
def test_resizes_as_torchvision(height, width, size, digest):
    image = image_files.resize_and_crop(Image.fromarray(ramp(height, width)), (size, size))
    assert image.size == (size, size)
    assert hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize('width, height, size, left, top', [
    (5, 3, 3, 1, 0), (6, 3, 3, 2, 0), (8, 3, 3, 2, 0),
    (3, 5, 3, 0, 1), (3, 6, 3, 0, 2), (3, 3, 3, 0, 0),
])
def test_half_offsets_round_to_even(width, height, size, left, top):
    pixels = ramp(height, width)
    cropped = np.asarray(image_files.resize_and_crop(Image.fromarray(pixels), (size, size)))
    np.testing.assert_array_equal(cropped, pixels[top:top + size, left:left + size])


@pytest.mark.parametrize('height, width, size', [
    (375, 500, (48, 32)), (500, 333, (20, 64)), (257, 129, (8, 32)), (13, 700, (16, 4)),
])
def test_rectangles_are_the_middle_of_the_square_that_covers_them(height, width, size):
    # As long as the side that decides the scale is the short one, as it is for squares.
    image, side = Image.fromarray(ramp(height, width)), max(size)
    square = np.asarray(image_files.resize_and_crop(image, (side, side)))
    found = np.asarray(image_files.resize_and_crop(image, size))
    top, left = (side - size[0]) // 2, (side - size[1]) // 2
    np.testing.assert_array_equal(found, square[top : side - top, left : side - left])


@pytest.mark.parametrize('height, width, size, resized, top, left', [
    (100, 100, (48, 32), (48, 48), 0, 8),  # taller than the image: the height decides
    (100, 100, (32, 48), (48, 48), 8, 0),
    (100, 300, (10, 40), (13, 40), 2, 0),  # the long side decides; 13.3 is rounded down
    (300, 100, (40, 10), (40, 13), 0, 2),
    (30, 20, (48, 32), (48, 32), 0, 0),  # the same aspect: nothing is cut
    (3, 2, (6, 9), (13, 9), 4, 0),  # enlarged
    (48, 40, (48, 32), (48, 40), 0, 4),  # pixels stay as they are
])
def test_rectangles_are_covered_and_cut(height, width, size, resized, top, left):
    image = Image.fromarray(ramp(height, width))
    whole = np.asarray(image.resize(resized[::-1], Image.Resampling.BILINEAR))
    found = np.asarray(image_files.resize_and_crop(image, size))
    np.testing.assert_array_equal(found, whole[top : top + size[0], left : left + size[1]])


def test_small_image_by_hand():
    # 2x2 to 4x4, bilinear: weights 1/4 and 3/4 between neighbours, the border repeated.
    image = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8))
    np.testing.assert_array_equal(np.asarray(image_files.resize_and_crop(image, (4, 4))), [
        [0, 20, 60, 80], [40, 60, 100, 120], [120, 140, 180, 200], [160, 180, 220, 240],
    ])


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    deep = np.array([[0, 255], [256, 65535]], np.uint16)
    Image.fromarray(deep).save(tmp_path / 'deep.png')
    encoded = encode(tmp_path / 'deep.png', size=(2, 2))
    assert read_png(encoded.png)[..., 0].tolist() == [[0, 0], [1, 255]]
    assert encoded.notes == ('has 16 bits per channel, of which the upper 8 were kept',)


def test_sixteen_bit_colour(tmp_path):
    rows = 2 * (b'\0' + struct.pack('>6H', 0, 255, 256, 0x1234, 0xfffe, 0x8000))

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', checksum)

    header = struct.pack('>IIBBBBB', 2, 2, 16, 2, 0, 0, 0)
    (tmp_path / 'deep.png').write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )
    encoded = encode(tmp_path / 'deep.png', size=(2, 2))
    assert read_png(encoded.png)[0].tolist() == [[0, 0, 1], [0x12, 0xff, 0x80]]
    assert 'has 16 bits' in encoded.notes[0]


def test_cmyk_and_small_are_notes(tmp_path):
    Image.new('CMYK', (3, 5), (0, 255, 255, 0)).save(tmp_path / 'print.jpg')
    encoded = encode(tmp_path / 'print.jpg')
    assert encoded.notes == (
        'is CMYK and was converted to RGB', 'is 3x5, smaller than 8x8, and was enlarged'
    )
    red, green, blue = read_png(encoded.png)[4, 4].tolist()
    assert red > 240 and green < 15 and blue < 15
    Image.new('L', (1, 1), 7).save(tmp_path / 'dot.png')
    encoded = encode(tmp_path / 'dot.png')
    assert encoded.notes == ('is 1x1, smaller than 8x8, and was enlarged',)
    assert (read_png(encoded.png) == 7).all()


def test_sizes_of_rectangles_say_which_side_is_which(tmp_path):
    Image.fromarray(ramp(8, 9)).save(tmp_path / 'a.png')
    encoded = encode(tmp_path / 'a.png', size=(12, 6))
    assert encoded.notes == ('is 9x8, smaller than 6x12 (width x height), and was enlarged',)
    assert read_png(encoded.png).shape == (12, 6, 3)
    assert encode(tmp_path / 'a.png', size=(8, 6)).notes == ()
    refused = encode(tmp_path / 'a.png', size=(8, 6), exact=True)
    assert refused.reason == 'is 9x8, not 6x8 (width x height)'


def save(image, kind, **options):
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def bomb():
    # A header that promises 400 million pixels.
    header = b'IHDR' + struct.pack('>IIBBBBB', 20000, 20000, 8, 2, 0, 0, 0)
    data = save(Image.new('RGB', (1, 1)), 'PNG')
    return data[:12] + header + struct.pack('>I', zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize('data, says', [
    (lambda: save(Image.fromarray(ramp(90, 90)), 'JPEG')[:900], 'is damaged: image file is trunc'),
    (lambda: save(Image.fromarray(ramp(90, 90)), 'PNG')[:900], 'is damaged: '),
    (lambda: b'hello', 'is not an image in any of the formats JPEG, PNG'),
    (lambda: b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', 'is not an image'),
    (lambda: b'', 'is empty'),
    (bomb, 'is a decompression bomb: '),
    (lambda: save(Image.fromarray(np.ones((9, 9), np.float32)), 'TIFF'), 'has 32-bit pixels (F)'),
    (lambda: save(Image.new('L', (1, 60000)), 'PNG'), 'is 1x60000, which is too elongated'),
])
def test_bad_files_have_a_reason(tmp_path, data, says):
    (tmp_path / 'bad.jpg').write_bytes(data())
    encoded = encode(tmp_path / 'bad.jpg', size=(64, 64))
    assert encoded.png is None and encoded.reason.startswith(says)
    assert '\n' not in encoded.reason


@pytest.mark.parametrize('kind, options', [
    ('AVIF', {'quality': 100, 'subsampling': '4:4:4'}), ('JPEG2000', {}), ('TGA', {}), ('WEBP', {'lossless': True}),
])
def test_rarer_formats(tmp_path, kind, options):
    pixels = np.zeros((8, 8, 3), np.uint8) + np.array([200, 30, 90], np.uint8)
    path = tmp_path / ('image.tga' if kind == 'TGA' else 'image')
    path.write_bytes(save(Image.fromarray(pixels), kind, **options))
    assert np.abs(read_png(encode(path).png).astype(int) - pixels).max() <= 2
    assert image_files.size_of(File('image.tga', str(path), 0, path.stat().st_size)) == (8, 8)


def test_exact_refuses_other_sizes(tmp_path):
    Image.fromarray(ramp(8, 9)).save(tmp_path / 'wide.png')
    assert encode(tmp_path / 'wide.png', exact=True).reason == 'is 9x8, not 8x8'


def test_unreadable_and_changed_files(tmp_path):
    gone = File('gone.png', str(tmp_path / 'gone.png'), 0, UNREADABLE)
    encoded, = image_files.encode_files([gone], Form((8, 8)))
    assert encoded.reason == 'is a broken link or not a regular file'
    Image.fromarray(ramp(8, 8)).save(tmp_path / 'a.png')
    longer = File('a.png', str(tmp_path / 'a.png'), 0, os.path.getsize(tmp_path / 'a.png') + 1)
    with pytest.raises(OSError, match='became shorter'):
        image_files.encode_files([longer], Form((8, 8)))
    with pytest.raises(OSError, match='no longer exists'):  # a drive that went away, perhaps
        image_files.encode_files([longer._replace(path='/nowhere/a.png')], Form((8, 8)))


def test_forbidden_files_are_bad(tmp_path, monkeypatch):
    (tmp_path / 'mine.png').write_bytes(b'secret')

    def forbid(*args):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', forbid)
    assert encode(tmp_path / 'mine.png').reason == 'cannot be read: Permission denied'


def test_arrays_keep_their_pixels_or_are_resized():
    images = np.stack([ramp(8, 8), 255 - ramp(8, 8)])
    kept = image_files.encode_array(images, (8, 8))
    np.testing.assert_array_equal(np.stack([read_png(e.png) for e in kept]), images)
    grey, = image_files.encode_array(np.array([[[0, 80], [160, 240]]], np.uint8)[..., None], (4, 4))
    assert read_png(grey.png)[..., 0].tolist()[0] == [0, 20, 60, 80]


def test_rectangular_arrays():
    images = np.stack([ramp(8, 5), 255 - ramp(8, 5)])
    kept = image_files.encode_array(images, (8, 5))
    np.testing.assert_array_equal(np.stack([read_png(e.png) for e in kept]), images)
    cropped = image_files.encode_array(images[..., :1], (8, 3))
    np.testing.assert_array_equal(
        np.stack([read_png(e.png) for e in cropped]), images[:, :, 1:4, :1]
    )


def photograph(path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ramp(4, 6)).save(path, exif=exif)
    return path


def test_exif_rotation_is_said_and_applied_on_demand(tmp_path):
    upright = photograph(tmp_path / 'upright.png', 1)
    turned = photograph(tmp_path / 'turned.png', 6)  # a quarter turn clockwise is due
    assert encode(upright, (4, 6), True).notes == ()
    as_it_lies = encode(turned, (4, 6), True)
    assert as_it_lies.notes == (image_files.ROTATED,)
    np.testing.assert_array_equal(read_png(as_it_lies.png), ramp(4, 6))
    as_meant = encode(turned, (6, 4), True, rotate=True)
    assert as_meant.notes == ()
    np.testing.assert_array_equal(read_png(as_meant.png), np.rot90(ramp(4, 6), -1))
    file = File('turned.png', str(turned), 0, turned.stat().st_size)
    assert image_files.size_of(file) == (4, 6) and image_files.size_of(file, True) == (6, 4)


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_hidden_colours_are_said_and_painted_over_on_demand(tmp_path, mode):
    grey, alpha = np.full((2, 2), 90, np.uint8), np.array([[0, 255], [255, 255]], np.uint8)
    image = Image.merge('LA', [Image.fromarray(x) for x in (grey, alpha)])
    image.convert('RGBA').convert(mode).save(tmp_path / 'a.png')
    shown = encode(tmp_path / 'a.png', (2, 2), background=(255, 0, 0))
    assert shown.notes == ()
    np.testing.assert_array_equal(read_png(shown.png)[0, 0], [255, 0, 0])
    assert (read_png(shown.png).reshape(-1, 3)[1:] == 90).all()
    hidden = encode(tmp_path / 'a.png', (2, 2))
    assert hidden.notes == (image_files.TRANSPARENT,)
    assert mode == 'P' or (read_png(hidden.png) == 90).all()
    opaque = Image.merge('LA', [Image.fromarray(x) for x in (grey, np.full_like(alpha, 255))])
    opaque.save(tmp_path / 'b.png')
    assert encode(tmp_path / 'b.png', (2, 2)).notes == ()


def test_grey_images_keep_one_channel(tmp_path):
    files = {}
    for name, mode in (('grey', 'L'), ('deep', 'I;16'), ('alpha', 'LA'), ('colour', 'RGB')):
        path = tmp_path / f'{name}.png'
        Image.new(mode, (2, 2)).save(path)
        files[name] = File(path.name, str(path), 0, path.stat().st_size)
    (tmp_path / 'broken.png').write_bytes(b'no image')
    files['broken'] = File('broken.png', str(tmp_path / 'broken.png'), 0, 8)
    assert image_files.all_grey(files[k] for k in ('broken', 'grey', 'deep', 'alpha'))
    assert not image_files.all_grey(files.values())
    assert not image_files.all_grey([files['broken']])
    for name in ('grey', 'deep', 'alpha'):
        assert read_png(encode(tmp_path / f'{name}.png', (2, 2), channels=1).png).shape == (2, 2, 1)
