"""The optimizers by name.

All of them decay the parameters of two or more dimensions alone: no biases and no parameters of
normalization layers.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import config_dict

from music_jax.optim import lars, matrices_only, warmup_cosine


def _lars(
    learning_rate: optax.Schedule, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    return lars(learning_rate, weight_decay=config.weight_decay, momentum=config.momentum)


def _sgd(
    learning_rate: optax.Schedule, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    # optax's own mask would add to the optimizer's state: saved runs could not be resumed.
    decay = optax.stateless_with_tree_map(
        lambda g, w: g + config.weight_decay * w if jnp.ndim(w) >= 2 else g
    )
    return optax.chain(decay, optax.sgd(learning_rate, momentum=config.momentum))


def _adamw(
    learning_rate: optax.Schedule, config: config_dict.ConfigDict
) -> optax.GradientTransformation:
    return optax.adamw(learning_rate, weight_decay=config.weight_decay, mask=matrices_only)


OPTIMIZERS: dict[
    str, Callable[[optax.Schedule, config_dict.ConfigDict], optax.GradientTransformation]
] = {"lars": _lars, "sgd": _sgd, "adamw": _adamw}


def make_schedule(
    config: config_dict.ConfigDict,
    steps_per_epoch: int,
    base_learning_rate: float | jax.Array | None = None,
) -> optax.Schedule:
    """Returns the learning rate of each step of the whole training.

    Args:
      config: The config.
      steps_per_epoch: Optimizer steps an epoch.
      base_learning_rate: Learning rate at a batch of 256; by default the config's.
    """
    if base_learning_rate is None:
        base_learning_rate = config.optimizer.base_learning_rate
    return warmup_cosine(
        base_learning_rate,
        batch_size=config.batch_size,
        steps_per_epoch=steps_per_epoch,
        num_epochs=config.num_epochs,
        warmup_epochs=config.optimizer.warmup_epochs,
        final_scale=config.optimizer.final_scale,
    )
