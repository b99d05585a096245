"""LARS and the learning-rate schedule of the method's recipes, as optax transformations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Mask = Any | Callable[[optax.Params], Any]


def matrices_only(params: optax.Params) -> Any:
    """Returns a mask that selects every parameter of two or more dimensions.

    Biases and the scales and offsets of normalization layers have one dimension.

    Args:
      params: Pytree of parameters.

    Returns:
      A pytree of booleans of the same structure.
    """
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)


def lars(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    trust_coefficient: float = 1e-3,
    mask: Mask | None = None,
) -> optax.GradientTransformation:
    r"""Returns the LARS optimizer as Barlow Twins, VICReg and MUSIC use it.

    .. math::
        g &\leftarrow g + \lambda w \\
        g &\leftarrow g \, \eta |w| / |g| \quad (1 \text{ if either norm is } 0) \\
        m &\leftarrow \mu m + g \\
        w &\leftarrow w - \alpha_t m

    The learning rate is applied *after* the momentum. :func:`optax.lars` applies it before, which
    moves the parameters differently under a schedule: by two thirds as much in a warm-up of five
    steps.

    Args:
      learning_rate: Learning rate :math:`\alpha`, a number or a schedule.
      weight_decay: Weight decay :math:`\lambda`.
      momentum: Momentum :math:`\mu`.
      trust_coefficient: Trust coefficient :math:`\eta`.
      mask: Pytree of booleans, or a function from parameters to one, that selects the parameters
        to decay and adapt; the others are updated by SGD with momentum. By default
        :func:`matrices_only`, which excludes biases and normalization layers.

    Returns:
      An :class:`optax.GradientTransformation` whose `update` requires the parameters.

    Example:
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

    Reference:
      You et al, `Large Batch Training of Convolutional Networks
      <https://arxiv.org/abs/1708.03888>`_, 2017
    """
    mask = matrices_only if mask is None else mask
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=mask),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), mask),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def warmup_cosine(
    base_learning_rate: float | jax.Array,
    *,
    batch_size: int,
    steps_per_epoch: int,
    num_epochs: int,
    warmup_epochs: float = 10,
    final_scale: float = 1e-3,
) -> optax.Schedule:
    """Returns a schedule with a linear warm-up from zero and a cosine decay.

    The peak is `base_learning_rate * batch_size / 256`, and the last value `final_scale` times the
    peak.

    Args:
      base_learning_rate: Peak learning rate for a batch of 256; may be traced.
      batch_size: Number of samples in the global batch.
      steps_per_epoch: Number of optimizer steps per epoch.
      num_epochs: Length of the schedule in epochs, including the warm-up.
      warmup_epochs: Length of the warm-up in epochs; may be 0.
      final_scale: Ratio of the last learning rate to the peak.

    Returns:
      A function that maps step counts to learning rates.

    Raises:
      ValueError: If a count is not positive, or the warm-up is not shorter than the schedule.

    Example:
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
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    if warmup_steps >= num_epochs * steps_per_epoch:
        raise ValueError(
            f"warmup_epochs = {warmup_epochs} is all of the {num_epochs * steps_per_epoch} steps; "
            "give a shorter warm-up"
        )
    # Of a peak of 1, because optax compares the peak with 0 in Python, which may be traced here.
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        1.0,
        warmup_steps=warmup_steps,
        decay_steps=num_epochs * steps_per_epoch,
        end_value=final_scale,
    )
    peak = base_learning_rate * batch_size / 256
    # optax divides the step, which must be a float under strict promotion.
    return lambda step: peak * schedule(jnp.asarray(step, jnp.float32))
