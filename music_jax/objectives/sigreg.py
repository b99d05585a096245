"""SIGReg, the objective of LeJEPA."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from music_jax.objectives.global_batch import (
    AxisName,
    accumulation_dtype,
    axis_size,
    check_pair,
    global_mean,
    over_global_batch,
)


def sigreg_loss(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    *,
    key: jax.Array,
    sigreg_weight: float | jax.Array = 0.05,
    num_slices: int = 1024,
    num_points: int = 17,
    t_max: float = 5.0,
    axis_name: AxisName | None = None,
) -> jax.Array:
    r"""Computes the LeJEPA objective, invariance and SIGReg, of two views' embeddings.

    .. math::

      \frac{1 - \lambda}{2 N D} \sum_{v, n, i} (z^v_{ni} - \bar z_{ni})^2
      + \frac{\lambda}{2 M} \sum_{v, m} N \int_{-T}^{T}
      \left| \frac{1}{N} \sum_n e^{i t \langle u_m, z^v_n \rangle} - e^{-t^2 / 2} \right|^2
      e^{-t^2 / 2} \, dt

    where :math:`\bar z` is the mean of the two views and the u are M random unit directions. The
    integral is the Epps-Pulley statistic, which compares the characteristic function of the
    projected embeddings with that of a standard normal distribution, computed by the trapezoidal
    rule. The invariance is averaged over units, as in the authors' code.

    Directions are drawn from `key`. LeJEPA draws them anew in each step, the same on all devices:
    give a key that depends on the step, for example by :func:`jax.random.fold_in`. See
    :func:`music_loss` for the use on several devices, which exchange the means of M cosines and M
    sines per view and point.

    Args:
      embeddings_a: First view, floating array [batch, dim].
      embeddings_b: Second view of the same samples, of the same shape and dtype.
      key: Key of the directions, by :func:`jax.random.key`; the same on all devices.
      sigreg_weight: Weight :math:`\lambda` of SIGReg, in [0, 1].
      num_slices: Number of directions M.
      num_points: Number of points of the trapezoidal rule in [-T, T].
      t_max: Limit T of the integral.
      axis_name: Axis, or axes, that the caller's `shard_map` or `pmap` has mapped over the batch.

    Returns:
      A scalar, float32, or float64 for float64 embeddings.

    Raises:
      ValueError: If the views differ in shape or dtype or are not floating arrays [batch, dim],
        `key` is not a single key, there is no direction, there are fewer than two points, or
        `t_max` is not a positive finite number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from music_jax.objectives import sigreg_loss
      >>> z = jax.random.normal(jax.random.key(0), (1024, 8))
      >>> normal, collapsed = (
      ...     sigreg_loss(x, x, key=jax.random.key(1)) for x in (z, jnp.zeros_like(z)))
      >>> print(f"{normal:.2f} {collapsed:.1f}")
      0.05 20.9

    Reference:
      Balestriero & LeCun, `LeJEPA: Provable and Scalable Self-Supervised Learning Without the
      Heuristics <https://arxiv.org/abs/2511.08544>`_, 2025
    """
    check_pair(embeddings_a, embeddings_b)
    is_key = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not is_key or key.shape:
        raise ValueError(f"key: expected a single key, as by jax.random.key(0), got {key!r}")
    for name, count, least in (("num_slices", num_slices, 1), ("num_points", num_points, 2)):
        if isinstance(count, bool) or not hasattr(count, "__index__") or count < least:
            raise ValueError(f"{name}: expected an int of at least {least}, got {count!r}")
    if not 0 < t_max < math.inf:
        raise ValueError(f"t_max: expected a positive finite number, got {t_max}")
    function = functools.partial(
        _sigreg, num_slices=num_slices, num_points=num_points, t_max=float(t_max)
    )
    weight = jnp.asarray(sigreg_weight, accumulation_dtype(embeddings_a.dtype))
    return over_global_batch(function, embeddings_a, embeddings_b, key, weight, axis_name=axis_name)


@functools.partial(jax.jit, static_argnames=("num_slices", "num_points", "t_max", "axis_name"))
def _sigreg(
    embeddings_a: jax.Array,
    embeddings_b: jax.Array,
    key: jax.Array,
    weight: jax.Array,
    *,
    num_slices: int,
    num_points: int,
    t_max: float,
    axis_name: AxisName | None,
) -> jax.Array:
    dtype = accumulation_dtype(embeddings_a.dtype)
    views = [jnp.asarray(z, dtype) for z in (embeddings_a, embeddings_b)]
    batch, dim = views[0].shape[0] * axis_size(axis_name), views[0].shape[1]
    # Drawn in float32 for any dtype, so that a key stands for the same directions.
    directions = jax.random.normal(key, (dim, num_slices), jnp.float32).astype(dtype)
    directions *= jax.lax.rsqrt(jnp.sum(directions**2, axis=0, keepdims=True))

    # The integrand is even: each point in [0, T] has twice its weight, except for 0.
    points = np.linspace(-t_max, t_max, num_points)[num_points // 2 :]
    spacings = np.full(len(points), 4 * t_max / (num_points - 1))
    spacings[-1] /= 2
    spacings[0] /= 1 + num_points % 2
    normal = np.exp(-(points**2) / 2)
    t, target, weights = (jnp.asarray(x, dtype) for x in (points, normal, spacings * normal))

    def statistic(z: jax.Array) -> jax.Array:
        projected = z @ directions  # [n, M]

        @jax.checkpoint  # one point at a time, without storing a cosine per point and projection
        def wave(t: jax.Array) -> tuple[jax.Array, jax.Array]:
            angles = t * projected
            return jnp.mean(jnp.cos(angles), axis=0), jnp.mean(jnp.sin(angles), axis=0)

        real, imaginary = global_mean(jax.lax.map(wave, t), axis_name)  # [points, M]
        squares = (real - target[:, None]) ** 2 + imaginary**2
        return batch * jnp.mean(weights @ squares)

    # Each view's squared distance to their mean is a quarter of that between the views.
    invariance = global_mean(jnp.mean((views[0] - views[1]) ** 2), axis_name) / 4
    sigreg = (statistic(views[0]) + statistic(views[1])) / 2
    return (1 - weight) * invariance + weight * sigreg
