"""Flips, warps and blurs batches of images, with parameters for each image."""

import functools

import jax
import jax.numpy as jnp

from music_jax.data.color import Planes, per_pixel


def flip_left_right(planes: Planes, apply: jax.Array) -> Planes:
    """Mirrors images of any dtype where `apply`, bool [...], is true."""
    return tuple(jnp.where(per_pixel(apply), jnp.flip(plane, -1), plane) for plane in planes)


def affine_matrices(
    *,
    rotation: jax.Array,
    translation_x: jax.Array,
    translation_y: jax.Array,
    scale: jax.Array,
    shear: jax.Array,
) -> jax.Array:
    """Returns the matrices that map an output pixel to its position in the input.

    The forward map is torchvision's `RandomAffine`: about the image's center, with x to the right
    and y down, `out = scale * R(rotation) @ [[1, -tan(shear)], [0, 1]] @ in + translation`.

    Args:
        rotation: Angle [...] in radians, clockwise on a screen.
        translation_x: Shift [...] in pixels.
        translation_y: Shift [...] in pixels.
        scale: Factor [...], positive.
        shear: Angle [...] in radians.

    Returns:
        float32 [..., 2, 3]: `in = m[:, :2] @ out + m[:, 2]`, both as (x, y) from the center.
    """
    cos, sin, tan = jnp.cos(rotation), jnp.sin(rotation), jnp.tan(shear)
    # The inverse of scale * [[cos, -cos tan - sin], [sin, -sin tan + cos]], of determinant scale².
    xx, xy = (cos - sin * tan) / scale, (sin + cos * tan) / scale
    yx, yy = -sin / scale, cos / scale
    x0 = -(xx * translation_x + xy * translation_y)
    y0 = -(yx * translation_x + yy * translation_y)
    rows = [jnp.stack([xx, xy, x0], axis=-1), jnp.stack([yx, yy, y0], axis=-1)]
    return jnp.stack(rows, axis=-2)


def warp_affine(planes: Planes, matrices: jax.Array) -> Planes:
    """Warps uint8 images bilinearly, with black around them.

    The four neighbors of a pixel are four bytes of one 32-bit word, so that one gather fetches them
    all. `dm_pix.affine_transform` treats the channels as a third dimension and gathers eight.

    Args:
        planes: Planes, each uint8 [..., height, width].
        matrices: float32 [..., 2, 3] from `affine_matrices`; the identity gives the input exactly.

    Returns:
        Planes, each float32 [..., height, width] in [0, 255].
    """
    *lead, height, width = planes[0].shape
    ones = (1,) * len(lead)
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    out_x = (jnp.arange(width, dtype=jnp.float32) - center_x).reshape(*ones, 1, width)
    out_y = (jnp.arange(height, dtype=jnp.float32) - center_y).reshape(*ones, height, 1)
    m = matrices[..., None, None]  # [..., 2, 3, 1, 1]
    x = m[..., 0, 0, :, :] * out_x + m[..., 0, 1, :, :] * out_y + m[..., 0, 2, :, :] + center_x
    y = m[..., 1, 0, :, :] * out_x + m[..., 1, 1, :, :] * out_y + m[..., 1, 2, :, :] + center_y
    x, y = jnp.clip(x, -1.0, width), jnp.clip(y, -1.0, height)  # all black from there on
    left = jnp.minimum(jnp.floor(x), width - 1.0)  # [..., height, width], in [-1, width - 1]
    above = jnp.minimum(jnp.floor(y), height - 1.0)
    dx, dy = x - left, y - above
    index = (above.astype(jnp.int32) + 1) * (width + 1) + left.astype(jnp.int32) + 1
    index = index.reshape(*lead, height * width)

    def warp(plane: jax.Array) -> jax.Array:
        # Word (i, j) starts at pixel (i - 1, j - 1): [..., (height + 1) * (width + 1)].
        words = _neighbor_words(plane).reshape(*lead, (height + 1) * (width + 1))
        found = jnp.take_along_axis(words, index, axis=-1, mode="promise_in_bounds")
        # To int32, since a CPU has no vector instruction from uint32 to float32.
        found = jax.lax.bitcast_convert_type(found, jnp.int32).reshape(plane.shape)
        corners = [((found >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16, 24)]
        upper = corners[0] * (1.0 - dx) + corners[1] * dx
        lower = corners[2] * (1.0 - dx) + corners[3] * dx
        return upper * (1.0 - dy) + lower * dy

    return tuple(warp(plane) for plane in planes)


def _neighbor_words(plane: jax.Array) -> jax.Array:
    """Packs each 2 x 2 square of uint8 [..., height, width], with a black border, in a uint32."""
    padded = jnp.pad(plane, [(0, 0)] * (plane.ndim - 2) + [(1, 1), (1, 1)]).astype(jnp.uint32)
    top, bottom = padded[..., :-1, :], padded[..., 1:, :]
    upper = top[..., :-1] | (top[..., 1:] << jnp.uint32(8))
    lower = (bottom[..., :-1] << jnp.uint32(16)) | (bottom[..., 1:] << jnp.uint32(24))
    return upper | lower  # [..., height + 1, width + 1]


def gaussian_blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blurs images as torchvision's `GaussianBlur` does, with reflected borders.

    The blur along each side is a product with a banded matrix, reflection included, since batched
    matrix products are fast on a TPU. `dm_pix.gaussian_blur` pads with zeros, which darkens the
    borders, and under `vmap` becomes a convolution with a kernel per image and channel.

    Args:
        images: Floating [..., height, width, channels]; products are computed in this dtype and
            summed in float32.
        sigma: Standard deviations in pixels, float32 [...], positive.

    Raises:
        ValueError: A side has a single pixel, which cannot be reflected.
    """
    height, width, _ = images.shape[-3:]
    if min(height, width) < 2:
        raise ValueError(f"expected images of 2 x 2 pixels or more to blur, got {height} x {width}")
    radius = max(1, min(height, width) // 20)  # a kernel of about a tenth of the side, as SimCLR
    rows = _blur_matrix(height, radius, sigma)
    columns = rows if width == height else _blur_matrix(width, radius, sigma)
    # Keeps the product of float32 images in float32 where the default is bfloat16.
    precision = jax.lax.Precision.HIGHEST if images.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision)
    images = einsum("...ij,...jwc->...iwc", rows.astype(images.dtype), images)
    return einsum("...ij,...hjc->...hic", columns.astype(images.dtype), images)


def _blur_matrix(side: int, radius: int, sigma: jax.Array) -> jax.Array:
    """Returns [..., side, side]; row i holds the weights of the pixels that make pixel i."""
    precision = (0.5 / sigma**2)[..., None]  # [..., 1]
    taps = jnp.arange(-radius, radius + 1, dtype=jnp.float32).reshape((1,) * sigma.ndim + (-1,))
    total = jnp.sum(jnp.exp(-(taps**2) * precision), axis=-1)[..., None, None]

    def weight(distance: jax.Array) -> jax.Array:
        distance = distance.reshape((1,) * sigma.ndim + (side, side))
        value = jnp.exp(-(distance.astype(jnp.float32) ** 2) * precision[..., None])
        return jnp.where(jnp.abs(distance) <= radius, value, 0.0)

    row = jax.lax.broadcasted_iota(jnp.int32, (side, side), 0)
    column = jax.lax.broadcasted_iota(jnp.int32, (side, side), 1)
    far = 10 * side  # no weight: a border pixel is not reflected onto itself
    # Pixel -k is pixel k, and pixel side - 1 + k is pixel side - 1 - k.
    before = jnp.where(column > 0, row + column, far)
    after = jnp.where(column < side - 1, 2 * (side - 1) - row - column, far)
    return (weight(row - column) + weight(before) + weight(after)) / total
