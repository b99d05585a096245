"""MUSIC: self-supervised pre-training of vision backbones, in JAX.

MUlti-Segmental Informational Coding, Niu & Wang, arXiv 2206.06461 (2022).

`music_jax.objectives`, `music_jax.optim` and the requirements of `load` are imported on first use.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from music_jax import objectives as objectives
    from music_jax import optim as optim
    from music_jax.exchange.encoder import Encoder

from music_jax import registry
from music_jax.version import __version__ as __version__


def _from_module(module: str, name: str) -> Callable[..., Any]:
    """Returns a function that imports a module when it is called, and calls its function `name`."""
    return lambda *arguments: getattr(importlib.import_module(module), name)(*arguments)


registry.final_evaluation = _from_module("music_jax.evaluation.protocols", "FinalEvaluation")
registry.online_evaluation = _from_module("music_jax.evaluation.online", "OnlineEvaluation")
registry.initial_backbone = _from_module("music_jax.exchange.importing", "initial_backbone")


def register_backbone(name: str, make: Callable[..., Any]) -> None:
    """Registers a backbone as `config.backbone.name`.

    Args:
      name: Name of the backbone; a backbone that was registered before is replaced.
      make: Function or class, called with the keyword arguments `channels` (of the images), `dtype`
        (to compute in), `rngs` (`flax.nnx.Rngs`) and those of `config.backbone.options`. It returns
        a `flax.nnx.Module` as `music_jax.models.Backbone` describes it.

    Raises:
      ValueError: The name is that of a backbone of music_jax, or is not valid.
    """
    from music_jax.models import BACKBONES

    spec = registry.BackboneSpec(make, is_registered=True)
    free = name not in BACKBONES or BACKBONES[name].is_registered
    registry.register(BACKBONES, name, spec, replaceable=free)


def register_objective(
    name: str, make: Callable[..., Any], *, search: Mapping[str, Sequence[Any]] | None = None
) -> None:
    """Registers an objective as `config.objective.name`.

    Args:
      name: Name of the objective; an objective that was registered before is replaced.
      make: Function, called with the keyword arguments in `config.objective.options`. It returns a
        function from the embeddings of two views, [batch, dim] each, of the global batch, to the
        loss and a dictionary of scalars to log.
      search: Values of some of these arguments for `music_jax.claims` to search, in ascending
        order; the ranges of positive numbers are extended if one of their ends is the best.

    Raises:
      ValueError: The name is that of an objective of music_jax, or is not valid; or the values of
        an argument in `search` are not a sequence.
    """
    from music_jax.train.recipe import OBJECTIVES

    for option, values in (search or {}).items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise ValueError(f"search[{option!r}] must be a sequence of values; got {values!r}")
    options = {option: tuple(values) for option, values in (search or {}).items()}
    objective = registry.RegisteredObjective(make, options)
    free = isinstance(OBJECTIVES.get(name, objective), registry.RegisteredObjective)
    registry.register(OBJECTIVES, name, objective, replaceable=free)


def register_dataset(name: str, open: Callable[..., Any]) -> None:
    """Registers a dataset as `config.dataset.name`.

    Args:
      name: Name of the dataset; a dataset that was registered before is replaced.
      open: Function, called with the name of a split and the keyword arguments in
        `config.dataset.options`. It returns None if there is no such split, or else an object with
        `len()` and `[index]`, which may be called by several threads. `[index]` returns a
        dictionary: `image` is an array [height, width, channels] of `config.dataset.pixel_type` or
        the bytes of an image file, and `label`, if there is one, an integer from 0. For images of
        several classes it is an array with an element for each class, 1, 0 or -1 for unknown, or
        else, with `class_names`, a list of the numbers of the image's classes. The object may have
        the attributes `labels`, integers [images] with -1 for none, or [images, classes], which
        saves reading all records for them, and `class_names`.

    Raises:
      ValueError: The name is not valid.
    """
    registry.register(registry.DATASETS, name, open, replaceable=True)


def load(path: str | os.PathLike[str], *, checkpoint: str | int | None = None) -> "Encoder":
    """Loads a trained backbone as a function from images to features.

    Example::

        import music_jax
        encoder = music_jax.load("runs/mnist5k")
        features = encoder(images)  # uint8 [images, height, width, channels], or a list of paths

    Args:
      path: Workdir of a run, or safetensors file written by `music_jax.export`.
      checkpoint: Step or directory of a checkpoint in the workdir; the latest by default.

    Returns:
      A `music_jax.exchange.encoder.Encoder`.

    Raises:
      UserError: The run, checkpoint or file does not exist or is damaged.
    """
    from music_jax.exchange.encoder import Encoder, load_backbone

    return Encoder(load_backbone(os.fspath(path), checkpoint=checkpoint))


def __getattr__(name: str) -> Any:
    if name in ("objectives", "optim"):
        return importlib.import_module(f"music_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
