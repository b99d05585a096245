"""A trained backbone: its weights by name, and the config for their use."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_dict

from music_jax.checkpoint.manager import restore_network
from music_jax.config import from_json, validate
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.exchange.weights import (
    Tensors,
    check_shapes,
    from_torch,
    read_safetensors,
    tensors_by_name,
)
from music_jax.models.network import FrozenBackbone, Network, make_frozen_backbone
from music_jax.workdir.directory import absolute_path
from music_jax.workdir.files import parse_json
from music_jax.workdir.run_config import read_config

METADATA_KEY = "music_jax"  # key of the description in the metadata of a safetensors file


@dataclasses.dataclass(frozen=True)
class TrainedBackbone:
    """The weights of a backbone, in float32, and its config.

    Attributes:
      config: Config of the run; for a backbone from a file, only the fields of `description`.
      step: Step of the checkpoint.
      tensors: Parameters and running statistics by dotted name, such as `blocks.0.norm1.mean`.
      network: Backbone with its projection head, or None if there are no weights for the head.
      params: Parameters of the network, or None.
      batch_stats: Running statistics of the network, or None.
    """

    config: config_dict.ConfigDict
    step: int
    tensors: Tensors
    network: Network | None = None
    params: Any = None
    batch_stats: Any = None

    @functools.cached_property
    def backbone(self) -> FrozenBackbone:
        """The backbone as a function of its weights."""
        return make_frozen_backbone(self.config)

    def backbone_arrays(self) -> tuple[Any, Any]:
        """Returns the parameters and the running statistics as nested dictionaries."""
        return tuple(
            unflatten_dict(
                {
                    path: self.tensors[".".join(map(str, path))].astype(np.float32)
                    for path in flatten_dict(shapes)
                }
            )
            for shapes in (self.backbone.params, self.backbone.batch_stats)
        )

    def description(self) -> dict[str, Any]:
        """Returns the metadata that a file needs besides the tensors to be loaded, as JSON."""
        config = self.config
        fields = ("name", "stem", "num_heads")
        backbone = {k: config.backbone[k] for k in fields if config.backbone[k] is not None}
        return {
            "version": 1,
            "step": self.step,
            "num_features": self.backbone.num_features,
            "config": {
                "backbone": backbone,
                "crop": {"size": config.crop.size, "eval_resize": config.crop.eval_resize},
                "dataset": {
                    "num_channels": config.dataset.num_channels,
                    "mean": list(config.dataset.mean),
                    "std": list(config.dataset.std),
                },
            },
        }


def load_backbone(path: str, *, checkpoint: str | None = None) -> TrainedBackbone:
    """Loads a backbone from a run's workdir or from an exported safetensors file.

    Args:
      path: Workdir or file.
      checkpoint: Step or directory of a checkpoint in the workdir; None for the latest valid one.

    Raises:
      UserError: There is no workdir or file, or it cannot be read.
    """
    location = epath.Path(path).expanduser()
    if location.is_dir():
        return _load_run(path, checkpoint)
    if not location.exists():
        raise UserError(f"there is neither a workdir nor a file {path!r}")
    if checkpoint is not None:
        raise UserError(f"{path} is a file and has no checkpoints; omit --checkpoint")
    return _load_file(location)


def _load_run(path: str, checkpoint: str | None) -> TrainedBackbone:
    workdir = absolute_path(path)
    saved = read_config(workdir)
    if saved is None:
        raise UserError(f"{path} holds no run: it has no config.json")
    config = from_json(saved)
    config.compute_dtype = "float32"
    validate(config)
    step, network, *variables = restore_network(workdir, config, checkpoint, make_data_mesh())
    params, batch_stats = jax.device_get(variables)
    tensors = tensors_by_name(params["backbone"], batch_stats.get("backbone", {}))
    return TrainedBackbone(config, step, tensors, network, params, batch_stats)


def _load_file(path: epath.Path) -> TrainedBackbone:
    tensors, metadata = read_safetensors(path)
    try:
        described = parse_json(metadata[METADATA_KEY])
        saved, step, layout = described["config"], int(described["step"]), described["layout"]
        if not isinstance(saved, dict) or layout not in ("music_jax", "torchvision"):
            raise ValueError("its description is from another version")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} was not exported by music_jax.export ({type(error).__name__}: {error}); "
            "import weights from elsewhere with python -m music_jax.import_weights"
        ) from error
    try:
        config = from_json(saved)
        config.compute_dtype = "float32"
        validate(config)
        np.asarray((config.dataset.mean, config.dataset.std), np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"the description in {path} is not a valid config: {error}") from error
    if layout == "torchvision":
        tensors = from_torch(config, tensors, str(path))
    trained = TrainedBackbone(config, step, tensors)
    expected = tensors_by_name(trained.backbone.params, trained.backbone.batch_stats)
    check_shapes(tensors, {name: tuple(x.shape) for name, x in expected.items()}, str(path))
    return trained
