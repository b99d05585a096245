"""MUSIC: self-supervised pre-training of vision backbones, in JAX.

MUlti-Segmental Informational Coding, Niu & Wang, arXiv 2206.06461 (2022).

`music_jax.objectives`, `music_jax.optim` and the requirements of `load` are imported on first use.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from music_jax import objectives as objectives
    from music_jax import optim as optim
    from music_jax.exchange.encoder import Encoder

from music_jax import registry
from music_jax.version import __version__ as __version__


def _final_evaluation(*arguments: Any) -> Any:
    from music_jax.evaluation.protocols import FinalEvaluation

    return FinalEvaluation(*arguments)


registry.final_evaluation = _final_evaluation


def load(path: str | os.PathLike[str], *, checkpoint: str | None = None) -> "Encoder":
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
    from music_jax.exchange.backbone import load_backbone
    from music_jax.exchange.encoder import Encoder

    return Encoder(load_backbone(os.fspath(path), checkpoint=checkpoint))


def __getattr__(name: str) -> Any:
    if name in ("objectives", "optim"):
        return importlib.import_module(f"music_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
