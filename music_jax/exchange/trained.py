"""A trained backbone: its tensors by name, and what is needed to use them."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.config import from_json, validate
from music_jax.errors import UserError
from music_jax.exchange import torch_names
from music_jax.exchange.tensors import Tensors, by_name, check_shapes, read_safetensors
from music_jax.models.network import FrozenBackbone, Network, make_frozen_backbone
from music_jax.workdir.json_files import parse_json

METADATA_KEY = "music_jax"  # where a safetensors file's metadata says what it holds


@dataclasses.dataclass(frozen=True)
class TrainedBackbone:
    """A backbone's weights with the config that gives them their meaning.

    Everything is in float32, whatever the run computed in.

    Attributes:
      config: of the run; of one read from a file, only what a `description` holds.
      step: of the checkpoint.
      tensors: parameters and running statistics of the backbone by dotted name, such as
        `blocks.0.norm1.mean`.
      network: the backbone with its projection head, if the weights of both are known.
      params: the network's, or None.
      batch_stats: the network's, or None.
    """

    config: config_dict.ConfigDict
    step: int
    tensors: Tensors
    network: Network | None = None
    params: Any = None
    batch_stats: Any = None

    @functools.cached_property
    def backbone(self) -> FrozenBackbone:
        """What the tensors are the weights of."""
        return make_frozen_backbone(self.config)

    def backbone_arrays(self) -> tuple[Any, Any]:
        """The tensors as nested parameters and running statistics."""
        return (
            _nested(self.backbone.params, self.tensors),
            _nested(self.backbone.batch_stats, self.tensors),
        )

    def description(self) -> dict[str, Any]:
        """What a file has to say beside the tensors, so that they can be used: plain JSON."""
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


def read_trained(path: str, *, checkpoint: str | None = None) -> TrainedBackbone:
    """Reads a backbone from a run's workdir, or from a safetensors file that was exported.

    Args:
      path: the workdir or the file.
      checkpoint: of a workdir: its step, or its directory; None for the latest whole one.

    Raises:
      UserError: there is neither, or it cannot be read.
    """
    where = epath.Path(path).expanduser()
    if where.is_dir():
        return _read_run(path, checkpoint)
    if not where.exists():
        raise UserError(f"there is neither a workdir nor a file {path!r}")
    if checkpoint is not None:
        raise UserError(f"{path} is a file, which has no checkpoints to choose from")
    return _read_file(where)


def _read_run(path: str, checkpoint: str | None) -> TrainedBackbone:
    from music_jax.checkpoint.restore import restore_network
    from music_jax.distributed.mesh import make_data_mesh
    from music_jax.workdir import records

    where = records.absolute(path)
    saved = records.read_config(where)
    if saved is None:
        raise UserError(f"{path} holds no run: it has no config.json")
    config = _in_float32(from_json(saved))
    validate(config)
    step, network, *variables = restore_network(where, config, checkpoint, make_data_mesh())
    params, batch_stats = jax.device_get(variables)
    tensors = by_name(params["backbone"]) | by_name(batch_stats.get("backbone", {}))
    return TrainedBackbone(config, step, tensors, network, params, batch_stats)


def _read_file(path: epath.Path) -> TrainedBackbone:
    tensors, metadata = read_safetensors(path)
    try:
        described = parse_json(metadata[METADATA_KEY])
        config, step, layout = described["config"], int(described["step"]), described["layout"]
        if not isinstance(config, dict) or layout not in ("music_jax", "torchvision"):
            raise ValueError("its description is not one of this version")
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{path} was not exported by music_jax.export ({type(error).__name__}: {error}); "
            "weights from elsewhere become a run with python -m music_jax.import_weights"
        ) from error
    try:
        config = _in_float32(from_json(config))
        validate(config)
        np.asarray((config.dataset.mean, config.dataset.std), np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"the description in {path} is not a config: {error}") from error
    if layout == "torchvision":
        tensors = torch_names.from_torch(config, tensors, str(path))
    trained = TrainedBackbone(config, step, tensors)
    expected = by_name(trained.backbone.params) | by_name(trained.backbone.batch_stats)
    check_shapes(tensors, {name: tuple(x.shape) for name, x in expected.items()}, str(path))
    return trained


def _in_float32(config: config_dict.ConfigDict) -> config_dict.ConfigDict:
    config.compute_dtype = "float32"
    return config


def _nested(like: Any, tensors: Tensors, prefix: str = "") -> Any:
    return {
        key: _nested(value, tensors, f"{prefix}{key}.")
        if isinstance(value, dict)
        else tensors[f"{prefix}{key}"].astype(np.float32)
        for key, value in like.items()
    }
