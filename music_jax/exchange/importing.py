"""Weights from elsewhere as a run, so that they are evaluated like one."""

import dataclasses
import hashlib
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax import records
from music_jax.config import validate
from music_jax.data.loader import TrainingOrder
from music_jax.errors import UserError
from music_jax.exchange import torch_names
from music_jax.exchange.model_card import IMPORTED_FILE
from music_jax.exchange.tensors import Tensors, read_safetensors
from music_jax.mesh import make_data_mesh
from music_jax.models.network import make_frozen_backbone
from music_jax.train.checkpoints import Checkpoints
from music_jax.train.guards import init_guard_state
from music_jax.train.state import TrainState, abstract_state, state_shardings
from music_jax.train.step import make_recipe

# A tensor that every state dict of a backbone of ours has.
_LANDMARKS = ("conv1.weight", "cls_token")
_OBJECTIVE = "vicreg"  # a run has one; of those without segments, it asks for nothing else
_CHUNK = 1 << 22  # bytes


def import_weights(
    weights: str, workdir: str, config: config_dict.ConfigDict, *, prefix: str | None = None
) -> config_dict.ConfigDict:
    """Makes a run of a backbone in the layout of torchvision or timm, at step 0.

    Which backbone it is follows from the tensors. The run's projection head gives back the features
    as they are, and its objective is one without segments, so that nothing is measured that was
    never trained.

    Args:
      weights: a safetensors file, with a classifier or not.
      workdir: for the run; it may not hold one yet.
      config: what the backbone is to be evaluated on, and how.
      prefix: what the backbone's tensors begin with, such as `module.backbone.`; None finds it.

    Returns:
      The run's config.

    Raises:
      UserError: the file holds no backbone that there is here, or the workdir holds a run.
    """
    source = epath.Path(weights).expanduser()
    tensors, _ = read_safetensors(source)
    tensors = _without_prefix(tensors, prefix, weights)
    config = _config_for(tensors, config, weights)
    ours = torch_names.from_torch(config, tensors, weights)

    directory = records.open_workdir(workdir)
    if records.read_config(directory) is not None or (directory / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already; name another --workdir, or remove it")
    state = _state(config, ours)
    order = TrainingOrder(config.batch_size, config.batch_size, config.seed)
    checkpoints = Checkpoints(directory)
    try:
        checkpoints.save(0, state, order)
        checkpoints.wait()
    finally:
        checkpoints.close()
    records.write_json(
        directory / IMPORTED_FILE,
        {"file": source.name, "sha256": _sha256(source), "prefix": prefix},
    )
    records.write_config(directory, config)
    return config


def _without_prefix(tensors: Tensors, prefix: str | None, where: str) -> Tensors:
    """The backbone's tensors alone."""
    if prefix is None:
        found = sorted(
            {
                name[: -len(landmark)]
                for name in tensors
                for landmark in _LANDMARKS
                if name == landmark or name.endswith("." + landmark)
            }
        )
        roots = [p for p in found if _is_root(tensors, p)]
        if len(roots) != 1:
            raise UserError(
                f"{where} holds {'several backbones' if roots else 'no backbone'} in the layout of "
                f"torchvision or timm (looked below {roots or found or 'conv1.weight, cls_token'})"
                + ("; name one with --prefix=" if roots else "")
            )
        prefix = roots[0]
    chosen = {
        name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)
    }
    if not chosen:
        raise UserError(f"no tensor of {where} begins with {prefix!r}; {sorted(tensors)[0]!r} does")
    return chosen


def _is_root(tensors: Tensors, prefix: str) -> bool:
    """Whether a backbone begins there; the blocks of a ResNet have a `conv1.weight` each."""
    return any(prefix + name in tensors for name in ("bn1.weight", "patch_embed.proj.weight")) and (
        prefix + "cls_token" in tensors or prefix + "layer1.0.conv1.weight" in tensors
    )


def _config_for(
    tensors: Tensors, config: config_dict.ConfigDict, where: str
) -> config_dict.ConfigDict:
    """The config with the backbone that the tensors are of, and a head of the features' size."""
    config = config.copy_and_resolve_references()
    found = torch_names.detect_backbone(tensors, where)
    stem = config.backbone.stem if config.backbone.stem != "imagenet" else None
    config.backbone.name = found["name"]
    config.backbone.stem = found.get("stem")
    if found.get("stem") == "cifar" and stem is not None:  # 3 x 3, as is that of `strided`
        config.backbone.stem = stem
    config.backbone.zero_init_residual = None
    config.projector.hidden_sizes = ()
    config.projector.output_size = make_frozen_backbone(config).num_features
    config.objective.name = _OBJECTIVE
    validate(config)
    channels = torch_names.input_channels(tensors)
    if channels != config.dataset.num_channels:
        raise UserError(
            f"{where} takes images of {channels} channels; config.dataset.num_channels is "
            f"{config.dataset.num_channels}"
        )
    return config


def _state(config: config_dict.ConfigDict, tensors: Tensors) -> TrainState:
    """The state before any training: the identity on the backbone that the tensors are of."""
    shapes = abstract_state(config, make_recipe(config, steps_per_epoch=1).optimizer)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for tree in (state.params["backbone"], state.batch_stats.get("backbone", {})):
        _fill(tree, tensors)
    head = state.params["projector"]["output"]
    head["kernel"] = np.eye(*head["kernel"].shape, dtype=np.float32)
    state = dataclasses.replace(state, guard=init_guard_state())
    return jax.device_put(state, state_shardings(shapes, make_data_mesh()))


def _fill(tree: Any, tensors: Tensors, prefix: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            _fill(value, tensors, f"{prefix}{key}.")
        else:
            tree[key] = tensors[f"{prefix}{key}"]


def _sha256(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
