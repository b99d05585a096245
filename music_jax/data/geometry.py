"""Flip, affine warp and Gaussian blur on batches of images, each with its own parameters."""

import jax
import jax.numpy as jnp

from music_jax.data.color import Planes, per_pixel


def flip_left_right(planes: Planes, apply: jax.Array) -> Planes:
    """Mirrors the images where `apply`.

    Args:
        planes: each [..., height, width], any dtype.
        apply: [...] bool.

    Returns:
        Planes like the input's.
    """
    return tuple(jnp.where(per_pixel(apply), jnp.flip(plane, -1), plane) for plane in planes)


def affine_matrices(
    *,
    rotation: jax.Array,
    translation_x: jax.Array,
    translation_y: jax.Array,
    scale: jax.Array,
    shear: jax.Array,
) -> jax.Array:
    """The maps from an output pixel to the input position it shows.

    The forward map is torchvision's `RandomAffine`: about the image's center, with x to the right
    and y down, `out = scale * R(rotation) @ [[1, -tan(shear)], [0, 1]] @ in + translation`.

    Args:
        rotation: [...] radians, clockwise as seen on a screen.
        translation_x: [...] pixels.
        translation_y: [...] pixels.
        scale: [...] factor > 0.
        shear: [...] radians.

    Returns:
        [..., 2, 3], float32: `in = m[:, :2] @ out + m[:, 2]`, both as (x, y) from the center.
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
    """Bilinear affine warp of uint8 images, with black around them.

    `dm_pix.affine_transform` treats the channels as a third dimension and gathers eight neighbors
    a value. Here the four neighbors of a pixel are four bytes of one 32-bit word, so that one
    gather fetches them all.

    Args:
        planes: each uint8 [..., height, width].
        matrices: float32 [..., 2, 3] from `affine_matrices`; the identity gives the input exactly.

    Returns:
        As many float32 [..., height, width] in [0, 255].
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
    """Each 2 x 2 square of [..., height, width] uint8 with a black border, as one uint32."""
    padded = jnp.pad(plane, [(0, 0)] * (plane.ndim - 2) + [(1, 1), (1, 1)]).astype(jnp.uint32)
    top, bottom = padded[..., :-1, :], padded[..., 1:, :]
    upper = top[..., :-1] | (top[..., 1:] << jnp.uint32(8))
    lower = (bottom[..., :-1] << jnp.uint32(16)) | (bottom[..., 1:] << jnp.uint32(24))
    return upper | lower  # [..., height + 1, width + 1]


def blur_radius(side: int) -> int:
    """Pixels on each side of the kernel's center, so that its size is about side / 10 (SimCLR)."""
    return max(1, side // 20)


def gaussian_blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian blur with reflected borders.

    As torchvision's `GaussianBlur`, with SimCLR's kernel size of about a tenth of the side
    (23 at 224 px). `dm_pix.gaussian_blur` pads with zeros, which darkens the borders, and under
    `vmap` becomes a convolution with a kernel per image and channel. Each side's blur is a product
    with a banded matrix here, reflection included: batched matrix products are what a TPU does
    best.

    Args:
        images: [..., height, width, channels], floating; products are taken in this dtype and
            summed in float32.
        sigma: [...] float32 standard deviations, in pixels, > 0.

    Returns:
        Images like the input's.

    Raises:
        ValueError: if a side has a single pixel, which cannot be reflected.
    """
    height, width, _ = images.shape[-3:]
    if min(height, width) < 2:
        raise ValueError(f"expected images of 2 x 2 pixels or more to blur, got {height} x {width}")
    radius = blur_radius(min(height, width))
    rows = _blur_matrix(height, radius, sigma)
    columns = rows if width == height else _blur_matrix(width, radius, sigma)
    # float32 images are multiplied as float32 also where the default is bfloat16 passes.
    precision = jax.lax.Precision.HIGHEST if images.dtype == jnp.float32 else None
    images = jnp.einsum(
        "...ij,...jwc->...iwc", rows.astype(images.dtype), images, precision=precision
    )
    return jnp.einsum(
        "...ij,...hjc->...hic", columns.astype(images.dtype), images, precision=precision
    )


def _blur_matrix(side: int, radius: int, sigma: jax.Array) -> jax.Array:
    """[..., side, side]: row i holds the weights of the pixels that make pixel i."""
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
    # Pixel -k shows pixel k, and pixel side - 1 + k shows pixel side - 1 - k.
    before = jnp.where(column > 0, row + column, far)
    after = jnp.where(column < side - 1, 2 * (side - 1) - row - column, far)
    return (weight(row - column) + weight(before) + weight(after)) / total
