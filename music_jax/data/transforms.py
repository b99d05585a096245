"""Transforms batches of images on the device, with parameters for each image.

Images are given as planes, one [..., height, width] array per channel: every operation on colors is
then elementwise, and XLA fuses a chain of them into one pass over memory. Values are in [0, 1],
or of any range where `clip` is false. Parameters have the images' leading shape [...].

The blends follow torchvision and PIL's `ImageEnhance`. dm_pix differs: its `adjust_brightness`
adds, its `adjust_contrast` blends with each channel's own mean, its `adjust_saturation` scales
HSV's S, the weights of its `rgb_to_grayscale` sum to 0.9999, and its `adjust_hue` fails under
strict dtype promotion.
"""

import functools

import dm_pix
import jax
import jax.numpy as jnp

Planes = tuple[jax.Array, ...]

# ITU-R BT.601, as in PIL's convert("L") and torchvision's rgb_to_grayscale.
_LUMA_WEIGHTS = (0.299, 0.587, 0.114)


def split_planes(images: jax.Array) -> Planes:
    """Splits [..., height, width, channels] into one [..., height, width] per channel."""
    return tuple(images[..., c] for c in range(images.shape[-1]))


def join_planes(planes: Planes) -> jax.Array:
    """Joins one [..., height, width] per channel to [..., height, width, channels]."""
    return jnp.stack(planes, axis=-1)


def per_pixel(values: jax.Array) -> jax.Array:
    """Reshapes values per image, [...], to [..., 1, 1], which broadcasts against planes."""
    return values[..., None, None]


def limit(plane: jax.Array, *, clip: bool) -> jax.Array:
    """Clips a plane to [0, 1], or returns it unchanged."""
    return jnp.clip(plane, 0.0, 1.0) if clip else plane


def luma(planes: Planes) -> jax.Array:
    """Returns the gray version of each image, [..., height, width]."""
    if len(planes) == 1:
        return planes[0]
    red, green, blue = planes
    return _LUMA_WEIGHTS[0] * red + _LUMA_WEIGHTS[1] * green + _LUMA_WEIGHTS[2] * blue


def grayscale(planes: Planes, apply: jax.Array) -> Planes:
    """Replaces every channel by the gray version where `apply`, bool [...], is true."""
    gray = luma(planes)
    return tuple(jnp.where(per_pixel(apply), gray, plane) for plane in planes)


def solarize(planes: Planes, apply: jax.Array) -> Planes:
    """Inverts the values of at least 0.5 where `apply`, bool [...], is true."""
    return tuple(
        jnp.where(per_pixel(apply), dm_pix.solarize(plane, 0.5), plane) for plane in planes
    )


def shift_hue(planes: Planes, shift: jax.Array) -> Planes:
    """Shifts the hue of RGB images, and keeps HSV's S and V.

    Args:
        planes: Three planes.
        shift: Shift [...] in turns of the color circle; 0 leaves an image exactly as it is.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    lowest = jnp.minimum(jnp.minimum(red, green), blue)
    chroma = value - lowest
    scale = 1.0 / jnp.where(chroma > 0, chroma, 1.0)  # gray has no hue, and needs none
    sextant = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, (blue - red) * scale + 2.0, (red - green) * scale + 4.0),
    )  # in [-1, 5]
    sextant = sextant + 6.0 * per_pixel(shift)
    sextant = sextant - 6.0 * jnp.floor(sextant * (1.0 / 6.0))  # in [0, 6]
    levels = (
        jnp.abs(sextant - 3.0) - 1.0,
        2.0 - jnp.abs(sextant - 2.0),
        2.0 - jnp.abs(sextant - 4.0),
    )
    # value * (1 - saturation * (1 - level)), as value * saturation = chroma.
    shifted = (lowest + chroma * jnp.clip(level, 0.0, 1.0) for level in levels)
    unchanged = per_pixel(shift) == 0
    return tuple(jnp.where(unchanged, old, new) for old, new in zip(planes, shifted, strict=True))


def color_jitter(
    planes: Planes,
    *,
    brightness: jax.Array | None = None,
    contrast: jax.Array | None = None,
    saturation: jax.Array | None = None,
    hue: jax.Array | None = None,
    clip: bool = True,
) -> Planes:
    """Changes brightness, contrast, saturation and hue, in this order.

    The first three are blends, `clip(f x + (1 - f) base, 0, 1)`, with a base of 0 for brightness,
    the mean of the gray image for contrast, and the gray image for saturation.

    Torchvision draws an order for each image. A program for a whole batch would then contain every
    operation at every position: compiled for TPU v5e at 224 px, 9.9 MB of memory accesses per image
    (XLA's count, ResNet's first convolution included) instead of 5.6 MB, which is the same as
    without any jitter; on a CPU, three times the time.

    Args:
        planes: Three planes, or one; then saturation and hue change nothing.
        brightness: Factor [...], at least 0; 1 changes nothing, None omits the operation.
        contrast: Factor [...], likewise.
        saturation: Factor [...], likewise.
        hue: Shift [...] in turns of the color circle, in [-0.5, 0.5]; 0 changes nothing.
        clip: Whether values are clipped to [0, 1] after each blend.
    """
    blend = functools.partial(_blend, clip=clip)
    if brightness is not None:
        planes = blend(planes, brightness, jnp.zeros_like(planes[0]))
    if contrast is not None:
        mean = jnp.mean(luma(planes), axis=(-2, -1), keepdims=True)  # [..., 1, 1]
        planes = blend(planes, contrast, mean)
    if len(planes) == 3 and saturation is not None:
        planes = blend(planes, saturation, luma(planes))
    if len(planes) == 3 and hue is not None:
        planes = shift_hue(planes, hue)
    return planes


def _blend(planes: Planes, factor: jax.Array, base: jax.Array, *, clip: bool) -> Planes:
    """Returns `f x + (1 - f) base`, clipped or not, base [..., height or 1, width or 1]."""
    factor = per_pixel(factor)
    rest = (1.0 - factor) * base
    return tuple(limit(factor * plane + rest, clip=clip) for plane in planes)


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
    """Warps images bilinearly, with zeros around them.

    The four neighbors of a uint8 pixel are four bytes of one 32-bit word, so that one gather
    fetches them all. `dm_pix.affine_transform` treats the channels as a third dimension and gathers
    eight.

    Args:
        planes: Planes, each uint8 or float32 [..., height, width].
        matrices: float32 [..., 2, 3] from `affine_matrices`; the identity gives the input exactly.

    Returns:
        Planes, each float32 [..., height, width] in the range of the input.
    """
    *lead, height, width = planes[0].shape
    ones = (1,) * len(lead)
    center_x, center_y = (width - 1) / 2, (height - 1) / 2
    out_x = (jnp.arange(width, dtype=jnp.float32) - center_x).reshape(*ones, 1, width)
    out_y = (jnp.arange(height, dtype=jnp.float32) - center_y).reshape(*ones, height, 1)
    m = matrices[..., None, None]  # [..., 2, 3, 1, 1]
    x = m[..., 0, 0, :, :] * out_x + m[..., 0, 1, :, :] * out_y + m[..., 0, 2, :, :] + center_x
    y = m[..., 1, 0, :, :] * out_x + m[..., 1, 1, :, :] * out_y + m[..., 1, 2, :, :] + center_y
    x, y = jnp.clip(x, -1.0, width), jnp.clip(y, -1.0, height)  # all zeros from there on
    left = jnp.minimum(jnp.floor(x), width - 1.0)  # [..., height, width], in [-1, width - 1]
    above = jnp.minimum(jnp.floor(y), height - 1.0)
    dx, dy = x - left, y - above
    index = (above.astype(jnp.int32) + 1) * (width + 1) + left.astype(jnp.int32) + 1
    index = index.reshape(*lead, height * width)

    def gather(squares: jax.Array) -> jax.Array:
        squares = squares.reshape(*lead, (height + 1) * (width + 1))
        return jnp.take_along_axis(squares, index, axis=-1, mode="promise_in_bounds")

    def warp(plane: jax.Array) -> jax.Array:
        # Square (i, j) starts at pixel (i - 1, j - 1).
        if plane.dtype == jnp.uint8:
            # To int32, since a CPU has no vector instruction from uint32 to float32.
            found = jax.lax.bitcast_convert_type(gather(_neighbor_words(plane)), jnp.int32)
            found = found.reshape(plane.shape)
            corners = [((found >> shift) & 255).astype(jnp.float32) for shift in (0, 8, 16, 24)]
        else:
            padded = jnp.pad(plane, [(0, 0)] * len(lead) + [(1, 1), (1, 1)])
            corners = [
                gather(padded[..., i : i + height + 1, j : j + width + 1]).reshape(plane.shape)
                for i in (0, 1)
                for j in (0, 1)
            ]
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
