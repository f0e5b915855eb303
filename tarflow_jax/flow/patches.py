"""Conversion between images and sequences of patches."""

import jax

Array = jax.Array


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Converts a size, one number or (height, width), to (height, width)."""
    return (size, size) if isinstance(size, int) else size


def patchify(images_BxHxWxC: Array, patch_size: int | tuple[int, int]) -> Array:
    """Converts images [B, H, W, C] to patches [B, T, D] in raster order.

    The numbers within a patch are in (row, column, channel) order.
    """
    B, H, W, C = images_BxHxWxC.shape
    h, w = pair(patch_size)
    x = images_BxHxWxC.reshape(B, H // h, h, W // w, w, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, (H // h) * (W // w), h * w * C)


def unpatchify(
    x_BxTxD: Array, patch_size: int | tuple[int, int], image_size: int | tuple[int, int]
) -> Array:
    """Converts patches [B, T, D] to images [B, H, W, C]; the inverse of `patchify`."""
    B, _, D = x_BxTxD.shape
    (h, w), (H, W) = pair(patch_size), pair(image_size)
    x = x_BxTxD.reshape(B, H // h, W // w, h, w, D // (h * w))
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, H, W, D // (h * w))
