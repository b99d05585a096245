"""Registries that upper packages fill for lower ones: choices of a config, final evaluation."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """The constructor of a backbone, and the config fields that it supports.

    Attributes:
      make: Class with its sizes; takes the keyword arguments `channels`, `dtype`, `rngs`,
        `remat` and those of `fields`.
      fields: Fields of `config.backbone` that the class takes; others must be unset.
      image_multiple: Number that divides the side of every image.
    """

    make: partial[Any]
    fields: tuple[str, ...] = ()
    image_multiple: int = 1


# Filled by music_jax.models.
BACKBONES: dict[str, BackboneSpec] = {}
# Filled by music_jax.train: from `config.objective` to a function of the embeddings of two views,
# or to a RandomObjective.
OBJECTIVES: dict[str, Callable[[Any], Any]] = {}
# Filled by music_jax.train: from a schedule and `config.optimizer` to an optax transformation.
OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {}

# Called as (config, workdir, source) at the start of a training; returns an object like
# `music_jax.evaluation.final.FinalEvaluation`, which evaluates the backbone at the end.
final_evaluation: Callable[..., Any]
