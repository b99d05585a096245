"""Optimizers and learning-rate schedules of the method's recipes, as optax transformations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Mask = Any | Callable[[optax.Params], Any]


def matrices_only(params: optax.Params) -> Any:
    """A mask that is True for every parameter of two or more dimensions.

    Biases and the scales and offsets of normalization layers have one dimension.
    """
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def scale_by_trust(trust_coefficient: float = 1e-3) -> optax.GradientTransformation:
    """Multiplies each parameter's update by `trust_coefficient * |w| / |g|` (1 if either is 0)."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "scale_by_trust needs the parameters: call update(grads, state, params)"
            )

        def scale(g: jax.Array, w: jax.Array) -> jax.Array:
            g_norm = jnp.sqrt(jnp.sum(jnp.square(g)))
            w_norm = jnp.sqrt(jnp.sum(jnp.square(w)))
            usable = (g_norm > 0) & (w_norm > 0)
            ratio = trust_coefficient * w_norm / jnp.where(usable, g_norm, jnp.ones_like(g_norm))
            return g * jnp.where(usable, ratio, jnp.ones_like(ratio))

        return jax.tree.map(scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    r"""LARS as Barlow Twins, VICReg and MUSIC train with it.

    .. math::
        g &\leftarrow g + \lambda w \\
        g &\leftarrow g \, \eta |w| / |g| \quad (1 \text{ where either norm is } 0) \\
        m &\leftarrow \mu m + g \\
        w &\leftarrow w - \alpha_t m

    The learning rate is applied *after* the momentum. `optax.lars` applies it before, which under
    a schedule moves the parameters differently: with a warm-up of five steps by two thirds as much.

    Args:
      learning_rate: :math:`\alpha`, a number or a schedule of the step.
      weight_decay: :math:`\lambda`.
      momentum: :math:`\mu`.
      trust_coefficient: :math:`\eta`.
      mask: what is decayed and adapted, as a pytree of booleans or a function from parameters to
        one. By default every parameter of two or more dimensions, so not biases nor the parameters
        of normalization layers; those take plain SGD with momentum.

    Returns:
      An `optax.GradientTransformation`; its `update` needs the parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from music_jax.optim import lars
      >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}
      >>> optimizer = lars(0.5, trust_coefficient=0.1)
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["kernel"][0], params["bias"])
      [0.95 0.95] [0.5 0.5]

    References:
      You et al, `Large Batch Training of Convolutional Networks
      <https://arxiv.org/abs/1708.03888>`_, 2017
    """
    mask = matrices_only if mask is None else mask
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.masked(scale_by_trust(trust_coefficient), mask),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def warmup_cosine(
    base_learning_rate: float | jax.Array,
    *,
    batch_size: int,
    steps_per_epoch: int,
    num_epochs: int,
    warmup_epochs: int = 10,
    final_scale: float = 1e-3,
) -> optax.Schedule:
    """Linear warm-up from zero, then a cosine down to `final_scale` of the peak.

    The peak is `base_learning_rate * batch_size / 256`.

    Args:
      base_learning_rate: the learning rate at a batch of 256.
      batch_size: the global batch.
      steps_per_epoch: optimizer steps an epoch.
      num_epochs: length of the whole schedule, warm-up included.
      warmup_epochs: length of the warm-up; may be 0.
      final_scale: the last learning rate as a fraction of the peak.

    Returns:
      An optax schedule: a function from the step, counted from 0, to the learning rate.

    Raises:
      ValueError: if a count is not positive, or the warm-up is not shorter than the schedule.

    Examples:
      >>> from music_jax.optim import warmup_cosine
      >>> schedule = warmup_cosine(
      ...     0.6, batch_size=2048, steps_per_epoch=625, num_epochs=100, warmup_epochs=10)
      >>> print(f"{schedule(3125):.2f} {schedule(6250):.2f} {schedule(62500):.4f}")
      2.40 4.80 0.0048
    """
    if batch_size < 1 or steps_per_epoch < 1 or num_epochs < 1:
        raise ValueError(
            "batch_size, steps_per_epoch and num_epochs must be at least 1; got "
            f"{batch_size}, {steps_per_epoch} and {num_epochs}"
        )
    if not 0 <= warmup_epochs < num_epochs:
        raise ValueError(
            f"warmup_epochs must be in [0, num_epochs = {num_epochs}); got {warmup_epochs}"
        )
    peak = base_learning_rate * batch_size / 256
    warmup_steps = warmup_epochs * steps_per_epoch
    cosine = optax.cosine_decay_schedule(
        peak, (num_epochs - warmup_epochs) * steps_per_epoch, alpha=final_scale
    )
    schedule = cosine
    if warmup_steps > 0:
        warmup = optax.linear_schedule(0.0, peak, warmup_steps)
        schedule = optax.join_schedules([warmup, cosine], [warmup_steps])
    # As a float from the start: optax divides the step, which strict promotion forbids of integers.
    return lambda step: schedule(jnp.asarray(step, jnp.float32))
