"""Registries: choices of a config, which upper packages and users fill, and hooks of training."""

import dataclasses
import importlib
import json
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from music_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """The constructor of a backbone, and the config fields that it supports.

    Attributes:
      make: Class with its sizes; takes the keyword arguments `channels`, `dtype`, `rngs` and those
        of `fields`.
      fields: Fields of `config.backbone` that the class takes; others must be unset.
      image_multiple: Number that divides the side of every image.
      stem: Names of the parameters that precede the blocks.
      takes_image_size: Whether `make` takes `image_size`, `config.crop.size`.
      is_registered: Whether it was registered by a user, and takes `config.backbone.options`.
    """

    make: Callable[..., Any]
    fields: tuple[str, ...] = ()
    image_multiple: int = 1
    stem: tuple[str, ...] = ()
    takes_image_size: bool = False
    is_registered: bool = False

    @property
    def sizes(self) -> dict[str, Any]:
        """Arguments that distinguish the backbones of this package from others of their class."""
        return self.make.keywords if isinstance(self.make, partial) else {}

    @property
    def stages(self) -> tuple[int, ...]:
        """Number of blocks in each stage; every block of a vision transformer is a stage."""
        return self.sizes.get("stage_sizes") or (1,) * self.sizes.get("depth", 0)


@dataclasses.dataclass(frozen=True)
class RegisteredObjective:
    """An objective that a user registered, with the interface of `OBJECTIVES`.

    Attributes:
      make: Function from options to an objective.
      search: Values of options that `music_jax.claims` searches, in ascending order.
    """

    make: Callable[..., Callable[..., Any]]
    search: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict, hash=False)

    def __call__(self, config: Any) -> Callable[..., Any]:
        """Returns the objective for the group `objective` of a config."""
        return self.make(**options(config))


# Filled by music_jax.models.
BACKBONES: dict[str, BackboneSpec] = {}
# Filled by music_jax.train: from `config.objective` to a function of the embeddings of two views,
# or to a RandomObjective.
OBJECTIVES: dict[str, Callable[[Any], Any]] = {}
# Filled by users: from a split and options to records, or None if there is no such split.
DATASETS: dict[str, Callable[..., Any]] = {}
# Filled by music_jax.train: from a schedule and `config.optimizer` to an optax transformation.
OPTIMIZERS: dict[str, Callable[[Any, Any], Any]] = {}


_IMPORT = "MUSIC_JAX_IMPORT"


def import_modules(names: str = "") -> None:
    """Imports modules that register parts, here and in all processes that this one starts.

    Args:
      names: Names of modules, separated by commas, besides those in the environment variable
        `MUSIC_JAX_IMPORT`.

    Raises:
      UserError: There is no such module, or it raises an exception.
    """
    given = [*os.environ.get(_IMPORT, "").split(","), *names.split(",")]
    modules = list(dict.fromkeys(name.strip() for name in given if name.strip()))
    for name in modules:
        if name.endswith(".py") or "/" in name:
            raise UserError(
                f"--import={name}: give the name of the module without .py, and its folder in "
                "PYTHONPATH if it is not in the current one"
            )
        try:
            importlib.import_module(name)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == name.partition(".")[0]:
                raise UserError(
                    f"--import={name}: there is no such module; give its folder in PYTHONPATH, "
                    "unless it is the current one"
                ) from error
            raise UserError(
                f"--import={name} fails with {type(error).__name__}: {error}"
            ) from error
    os.environ[_IMPORT] = ",".join(modules)


def register(table: dict[str, Any], name: str, part: Any, *, replaceable: bool) -> None:
    """Adds a part of a user to a table.

    Args:
      table: Table of this module.
      name: Name of the part in configs.
      part: Value in the table.
      replaceable: Whether an existing part of this name, if any, may be replaced.

    Raises:
      ValueError: The name has other characters than letters, digits, `_`, `.` and `-`, begins with
        one of the last two, or is taken.
    """
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            "a name consists of letters, digits, '_', '.' and '-', and begins with none of the "
            f"last two; got {name!r}"
        )
    if name in table and not replaceable:
        raise ValueError(f"the name {name!r} is taken by a part of music_jax")
    table[name] = part


def options(group: Any) -> dict[str, Any]:
    """Returns the field `options` of a group of the config with the types of JSON."""
    return json.loads(json.dumps(group.options.to_dict()))


# Called as (config, workdir, source) at the start of a training; returns an object like
# `music_jax.evaluation.protocols.FinalEvaluation`, which evaluates the backbone at the end.
final_evaluation: Callable[..., Any]
# Called as (config, source, network, mesh, skipped) by a training with `config.online.every_steps`;
# returns a function like `music_jax.evaluation.online.OnlineEvaluation`.
online_evaluation: Callable[..., Any]
# Called as (config) by a new training with `config.backbone.init_from`; see
# `music_jax.exchange.importing.initial_backbone`.
initial_backbone: Callable[..., Any]
