r"""A 1 x 1 convolution and the batch normalisation after it, without the feature map between them.

The convolution's output y = x W is linear in x. So its statistics follow from those of x,

    mean(y) = mean(x) W        var(y_c) = w_c^T cov(x) w_c

and where x has fewer channels than y, as before the last convolution of a bottleneck, its
covariance is cheaper to get than y is to read: what normalises is a factor and an offset, which the
convolution applies as it writes its output. Nor does the gradient need y: by the factor it is
`sum_n dz_nc y_nc = sum_k W_kc (x^T dz)_kc`, of which x^T dz is computed for W in any case.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from music_jax.models.batch_norm import BatchNorm

_IMAGES = ("NHWC", "HWIO", "NHWC")
# x [n, h, w, k] and y [n, h, w, c] to x^T y: k is the batch, n is what is summed over.
_PRODUCT = ("CHWN", "IHWO", "NHWC")


def convolve_and_normalize(
    x: jax.Array, conv: nnx.Conv, norm: BatchNorm, *, num_views: int
) -> jax.Array:
    """`norm(conv(x), train=True, num_views=num_views)`.

    Args:
      x: [batch * num_views, height, width, k], the views of a sample side by side.
      conv: 1 x 1, of stride 1 and without bias.
      norm: of its output; its running statistics move.
      num_views: views of a sample.

    Returns:
      [batch * num_views, height, width, c], of x's type.
    """
    kernel = conv.kernel[...][0, 0].astype(x.dtype)  # [k, c]
    weights = kernel.astype(jnp.float32)
    positions = x.size // x.shape[-1] // num_views
    views = x.reshape(-1, num_views, *x.shape[1:])
    x_mean = jnp.mean(views.astype(jnp.float32), axis=(0, 2, 3))  # [views, k]
    covariance = _products(x, num_views) / positions - x_mean[:, :, None] * x_mean[:, None, :]
    mean = _dot(x_mean, weights)  # [views, c]
    var = jnp.maximum(jnp.sum(_dot(covariance, weights) * weights[None], axis=1), 0.0)
    factor, offset = norm.affine(mean, var)
    scaled = _scaled_convolution(x, kernel, factor)
    return (scaled + _of_each_row(offset, x)).astype(x.dtype)


@jax.custom_vjp
def _scaled_convolution(x: jax.Array, kernel: jax.Array, factor: jax.Array) -> jax.Array:
    """[n, h, w, k] [k, c] [views, c] -> float32 [n, h, w, c]."""
    return _convolve(x, kernel).astype(jnp.float32) * _of_each_row(factor, x)


def _scaled_convolution_forward(
    x: jax.Array, kernel: jax.Array, factor: jax.Array
) -> tuple[Any, Any]:
    return _scaled_convolution(x, kernel, factor), (x, kernel, factor)


def _scaled_convolution_backward(
    residuals: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, kernel, factor = residuals
    of_output = (gradient * _of_each_row(factor, x)).astype(x.dtype)
    of_x = _convolve(of_output, kernel.T)
    of_product = _product(_views_apart(x, len(factor)), gradient.astype(x.dtype))
    of_product = of_product.reshape(len(factor), *kernel.shape)  # [views, k, c]
    of_kernel = jnp.sum(of_product * factor[:, None, :], axis=0)
    of_factor = jnp.sum(of_product * kernel.astype(jnp.float32)[None], axis=1)
    return of_x, of_kernel.astype(kernel.dtype), of_factor


_scaled_convolution.defvjp(_scaled_convolution_forward, _scaled_convolution_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _products(x: jax.Array, num_views: int) -> jax.Array:
    """x^T x of each view: [n, h, w, k] -> float32 [views, k, k]."""
    k = x.shape[-1]
    return _product(_views_apart(x, num_views), x).reshape(num_views, k, k)


def _products_forward(x: jax.Array, num_views: int) -> tuple[jax.Array, jax.Array]:
    return _products(x, num_views), x


def _products_backward(num_views: int, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    both = gradient + gradient.swapaxes(1, 2)  # [views, k, k]
    kernel = both.reshape(-1, both.shape[-1]).astype(x.dtype)
    return (_convolve(_views_apart(x, num_views), kernel),)


_products.defvjp(_products_forward, _products_backward)


def _views_apart(x: jax.Array, num_views: int) -> jax.Array:
    """[n, h, w, k] -> [n, h, w, views * k]: a row's channels stand at its view, zeros elsewhere.

    So one convolution does for each view what is the view's own, and reads the batch once.
    """
    views = jnp.eye(num_views, dtype=x.dtype)
    apart = [x * _of_each_row(of_view[:, None], x) for of_view in views]
    return jnp.concatenate(apart, axis=-1)


def _of_each_row(of_views: jax.Array, x: jax.Array) -> jax.Array:
    """[views, c] -> [n, 1, 1, c]: what each row of x [n, ...], views side by side, is given."""
    num_views, c = of_views.shape
    rows = jnp.broadcast_to(of_views[None], (x.shape[0] // num_views, num_views, c))
    return rows.reshape(-1, 1, 1, c)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[n, h, w, k] [k, c] -> [n, h, w, c]."""
    return jax.lax.conv_general_dilated(
        x, kernel[None, None], (1, 1), "VALID", dimension_numbers=_IMAGES
    )


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    """[n, h, w, k] [n, h, w, c] -> float32 [k, c]."""
    return jax.lax.conv_general_dilated(
        x,
        y,
        (1, 1),
        "VALID",
        dimension_numbers=_PRODUCT,
        precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )[:, 0, 0]


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)
