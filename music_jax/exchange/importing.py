"""Weights from elsewhere as a run, so that they are evaluated like one."""

import collections
import dataclasses
import hashlib
import re
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import validate
from music_jax.data.loader import TrainingOrder
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.exchange import torch_names
from music_jax.exchange.model_card import IMPORTED_FILE
from music_jax.exchange.tensors import Tensors, read_safetensors
from music_jax.models import BACKBONES
from music_jax.models.batch_norm import EPSILON as BATCH_NORM_EPSILON
from music_jax.models.network import make_frozen_backbone
from music_jax.models.resnet import STEMS
from music_jax.models.vision_transformer import EPSILON as LAYER_NORM_EPSILON
from music_jax.train.guards import init_guard_state
from music_jax.train.recipe import make_recipe
from music_jax.train.state import TrainState, abstract_state, save_state, state_shardings
from music_jax.workdir import records

# MoCo v3's vision transformers have 12 heads at any width, and its files these prefixes.
_MOCO_V3 = re.compile(r"(.*\.)?(base|momentum)_encoder\.")
_MOCO_V3_HEADS = 12
_OBJECTIVE = "vicreg"  # a run has one; of those without segments, it asks for nothing else
_CHUNK = 1 << 22  # bytes


@dataclasses.dataclass(frozen=True)
class Imported:
    """What became of a weights file.

    Attributes:
      config: The run's config.
      assumed: What the file does not tell and its features depend on, in words.
      left_out: Names of the modules whose tensors are none of the backbone's, with their counts.
    """

    config: config_dict.ConfigDict
    assumed: str
    left_out: dict[str, int]


def import_weights(
    weights: str, workdir: str, config: config_dict.ConfigDict, *, prefix: str | None = None
) -> Imported:
    """Makes a run of a backbone in the layout of torchvision or timm, at step 0.

    Which backbone it is follows from the tensors. The number of a vision transformer's heads does
    not: it is `config.backbone.num_heads`, or 12 if the names are those of MoCo v3's checkpoints.
    The run's projection head gives back the features as they are, and its objective is one without
    segments, so that nothing is measured that was never trained.

    Args:
      weights: a safetensors file, with a classifier or not.
      workdir: for the run; it may not hold one yet.
      config: what the backbone is to be evaluated on, and how.
      prefix: what the backbone's tensors begin with, such as `module.backbone.`; None finds it.

    Returns:
      The run's config, what was assumed and what was left out.

    Raises:
      UserError: the file holds no backbone that there is here, does not tell the number of heads,
        or the workdir holds a run.
    """
    source = epath.Path(weights).expanduser()
    found, _ = read_safetensors(source)
    if prefix is None:
        prefix = _find_prefix(found, weights)
    elif prefix:
        prefix = prefix.removesuffix(".") + "."
    tensors = _below(found, prefix, weights)
    config = _config_for(tensors, config, weights)
    ours = torch_names.from_torch(config, tensors, weights)
    config.backbone.num_heads = _num_heads(config, prefix, weights)
    imported = Imported(config, _assumed(config), _left_out(config, found, tensors, prefix))

    directory = records.open_workdir(workdir)
    if records.read_config(directory) is not None or (directory / "checkpoints").exists():
        raise UserError(f"{workdir} holds a run already; name another --workdir, or remove it")
    state = _state(config, ours)
    order = TrainingOrder(config.batch_size, config.batch_size, config.seed)
    checkpoints = Checkpoints(directory)
    try:
        save_state(checkpoints, 0, state, order)
        checkpoints.wait()
    finally:
        checkpoints.close()
    records.write_json(
        directory / IMPORTED_FILE,
        {
            "file": source.name,
            "sha256": _sha256(source),
            "prefix": prefix,
            "assumed": imported.assumed,
            "left_out": imported.left_out,
        },
    )
    records.write_config(directory, config)
    return imported


def _find_prefix(tensors: Tensors, where: str) -> str:
    """Returns what the names of the one backbone in a file begin with."""
    prefixes = torch_names.backbone_prefixes(tensors)
    if len(prefixes) > 1:
        raise UserError(
            f"{where} holds several backbones; name one with --prefix=, of "
            + ", ".join(repr(prefix) for prefix in prefixes[:8])
        )
    if not prefixes:
        raise UserError(
            f"{where} holds no backbone in the layout of torchvision or timm; expected "
            "layer1.0.conv1.weight (or 4.0.conv1.weight, of a Sequential) or cls_token, got "
            f"{', '.join(sorted(tensors)[:3]) or 'no tensors'}"
        )
    return prefixes[0]


def _below(tensors: Tensors, prefix: str, where: str) -> Tensors:
    """Returns the tensors whose names begin with a prefix, by torchvision's or timm's names."""
    chosen = {
        name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)
    }
    if not chosen:
        named = ", ".join(repr(name) for name in sorted(tensors)[:3]) or "none"
        raise UserError(f"no tensor of {where} begins with --prefix={prefix}; its tensors: {named}")
    return torch_names.named_children(chosen)


def _left_out(
    config: config_dict.ConfigDict, found: Tensors, tensors: Tensors, prefix: str
) -> dict[str, int]:
    """Counts the tensors of a file that are not used, by their modules."""
    modules = [prefix + name.partition(".")[0] for name in torch_names.unused(config, tensors)]
    depth = max(prefix.count("."), 1)
    modules += [
        ".".join(name.split(".")[:depth]) for name in sorted(found) if not name.startswith(prefix)
    ]
    return dict(collections.Counter(modules))


def _assumed(config: config_dict.ConfigDict) -> str:
    """Says what the features depend on and a file of weights does not tell."""
    backbone, dataset = config.backbone, config.dataset
    if backbone.num_heads is not None:
        found = (
            f"{backbone.num_heads} heads, normalization before attention and perceptron with "
            f"epsilon {LAYER_NORM_EPSILON:g}, exact GELU, the class token as features"
        )
    else:
        size, stride, pools = STEMS[backbone.stem or "imagenet"]
        found = (
            f"a {size} x {size} stem of stride {stride} {'with' if pools else 'without'} "
            "max-pooling, strides in the 3 x 3 convolutions, batch normalization with epsilon "
            f"{BATCH_NORM_EPSILON:g}"
        )
    return f"{found}; pixels with mean {tuple(dataset.mean)} and deviation {tuple(dataset.std)}"


def _num_heads(config: config_dict.ConfigDict, prefix: str, where: str) -> int | None:
    """Returns the heads of the backbone's attention; None of a ResNet.

    Raises:
      UserError: the file does not tell them.
    """
    usual = BACKBONES[config.backbone.name].make.keywords.get("num_heads")
    if usual is None or config.backbone.num_heads is not None:
        return config.backbone.num_heads
    if _MOCO_V3.fullmatch(prefix) or usual == _MOCO_V3_HEADS:
        return _MOCO_V3_HEADS
    raise UserError(
        f"{where} does not tell how many heads its {config.backbone.name} has: with "
        f"--config.backbone.num_heads={_MOCO_V3_HEADS} it is MoCo v3's, with "
        f"--config.backbone.num_heads={usual} it is timm's"
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
