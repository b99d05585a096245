"""Imports external weights: as a run to evaluate, or as the start of a training."""

import collections
import contextlib
import dataclasses
import hashlib
import logging
import re
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict

from music_jax import registry
from music_jax.checkpoint.manager import Checkpoints
from music_jax.config import validate
from music_jax.data.order import TrainingOrder
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.exchange.encoder import METADATA_KEY, load_backbone
from music_jax.exchange.formats import IMPORTED_FILE
from music_jax.exchange.weights import (
    TIMM_NAMES,
    TORCHVISION_NAMES,
    Tensors,
    check_shapes,
    from_torch,
    nested,
    read_safetensors,
    tensors_by_name,
    torch_names,
    unused_names,
)
from music_jax.models import BACKBONES
from music_jax.models.network import make_frozen_backbone
from music_jax.models.resnet import BATCH_NORM_EPSILON, STEMS, BasicBlock, Bottleneck
from music_jax.models.vision_transformer import EPSILON as LAYER_NORM_EPSILON
from music_jax.train.guards import init_guard_state
from music_jax.train.recipe import make_recipe
from music_jax.train.state import TrainState, abstract_state, save_state, state_shardings
from music_jax.workdir.directory import open_workdir
from music_jax.workdir.files import write_json
from music_jax.workdir.run_config import read_config, write_config

_logger = logging.getLogger(__name__)

# MoCo v3's vision transformers have 12 heads at any width; its checkpoints have these prefixes.
_MOCO_V3 = re.compile(r"(.*\.)?(base|momentum)_encoder\.")
_MOCO_V3_HEADS = 12
_OBJECTIVE = "vicreg"  # the run needs an objective; this one has no segments

# Tensors by which the prefix of a backbone is found: those of torchvision and timm, and those of
# `nn.Sequential(*list(resnet.children())[:-1])`, as lightly wraps a ResNet.
_LAYOUTS = (
    ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight"),
    ("0.weight", "1.weight", "7.0.conv1.weight", "4.0.conv1.weight"),
    ("patch_embed.proj.weight", "cls_token"),
)
_CHILDREN = {"0": "conv1", "1": "bn1"} | {f"{3 + i}": f"layer{i}" for i in (1, 2, 3, 4)}

# Number of axes of the tensors by which the architecture is found.
_LANDMARK_AXES = {"cls_token": 3, "patch_embed.proj.weight": 4, "conv1.weight": 4}


@dataclasses.dataclass(frozen=True)
class Imported:
    """The result of an import."""

    config: config_dict.ConfigDict  # of the run
    assumed: str  # properties that the features depend on and the file does not specify
    excluded: dict[str, int]  # number of tensors outside the backbone, by module


def import_backbone(
    weights: str, workdir: str, config: config_dict.ConfigDict, *, prefix: str | None = None
) -> Imported:
    """Creates a run at step 0 from a backbone in the layout of torchvision or timm.

    The architecture follows from the tensors, except for the number of heads of a vision
    transformer: it is `config.backbone.num_heads`, or 12 if the names are those of MoCo v3's
    checkpoints. The run's projection head is the identity and its objective has no segments, so
    that no untrained weights are evaluated.

    Args:
      weights: Safetensors file, with or without a classifier.
      workdir: Workdir of the new run; it must not hold a run yet.
      config: Config with the data and the settings of the evaluation.
      prefix: Prefix of the backbone's tensors, such as `module.backbone.`; None to detect it.

    Returns:
      The run's config, the assumptions and the excluded tensors.

    Raises:
      UserError: The file holds no supported backbone or does not determine its number of heads, or
        the workdir holds a run.
    """
    source = epath.Path(weights).expanduser()
    found, _ = read_safetensors(source)
    prefix, tensors = _select(found, prefix, weights)
    config = _config_for(tensors, config, weights)
    ours = from_torch(config, tensors, weights)
    config.backbone.num_heads = _num_heads(config, prefix, weights)
    imported = Imported(config, _assumed(config), _excluded(config, found, tensors, prefix))

    directory = open_workdir(workdir)
    if read_config(directory) is not None or (directory / "checkpoints").exists():
        raise UserError(f"{workdir} already holds a run; choose another --workdir or remove it")
    order = TrainingOrder(config.batch_size, config.batch_size, config.seed)
    with contextlib.closing(Checkpoints(directory)) as checkpoints:
        save_state(checkpoints, 0, _initial_state(config, ours), order)
        checkpoints.wait()
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    record = {"file": source.name, "sha256": sha256, "prefix": prefix}
    record |= {"assumed": imported.assumed, "excluded": imported.excluded}
    write_json(directory / IMPORTED_FILE, record)
    write_config(directory, config)
    return imported


def initial_backbone(config: config_dict.ConfigDict) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the backbone that a training starts from, and logs what is used and what is not.

    Args:
      config: Config of the training, with `backbone.init_from`: a workdir, a safetensors file of
        `music_jax.export`, or one in the layout of torchvision or timm.

    Returns:
      The parameters and the running statistics of the backbone, as in a training state.

    Raises:
      UserError: The weights cannot be read, or are not those of the config's backbone.
    """
    source, backbone = config.backbone.init_from, make_frozen_backbone(config)
    expected = tensors_by_name(backbone.params, backbone.batch_stats)
    try:
        tensors, layout, excluded = _read_backbone(config, source)
        check_shapes(tensors, {name: x.shape for name, x in expected.items()}, source)
    except UserError as error:
        raise UserError(f"config.backbone.init_from: {error}") from error
    rest = ", ".join(f"{name} ({count})" for name, count in excluded.items()) or "nothing"
    _logger.info(
        f"{'init_from':12s} {source} ({layout}): {len(tensors)} tensors of the backbone; not used: "
        f"{rest}"
    )
    params, batch_stats = (
        {"backbone": nested(tensors, tree)} if tree else {}
        for tree in (backbone.params, backbone.batch_stats)
    )
    return params, batch_stats


def _read_backbone(
    config: config_dict.ConfigDict, source: str
) -> tuple[Tensors, str, dict[str, int]]:
    """Returns tensors by our names, their layout, and the number of other tensors by module."""
    path = epath.Path(source).expanduser()
    if path.is_dir():
        trained = load_backbone(source)
        _check_same_architecture(config, trained.config, source)
        excluded = {"projector": len(jax.tree.leaves(trained.params["projector"]))}
        return trained.tensors, f"run, step {trained.step}", excluded
    found, metadata = read_safetensors(path)
    if METADATA_KEY in metadata:
        trained = load_backbone(source)
        _check_same_architecture(config, trained.config, source)
        if trained.tensors.keys() == found.keys():
            return found, "layout of music_jax", {}
    prefix, tensors = _select(found, None, source)
    if METADATA_KEY not in metadata:
        theirs = config.copy_and_resolve_references()
        theirs.backbone.name = _detect_backbone(tensors, source)
        if theirs.backbone.name == config.backbone.name:
            theirs.backbone.num_heads = _num_heads(config, prefix, source)
        _check_same_architecture(config, theirs, source)
    ours = from_torch(config, tensors, source)
    layout = f"layout of torchvision and timm, prefix {prefix!r}"
    return ours, layout, _excluded(config, found, tensors, prefix)


def _check_same_architecture(
    config: config_dict.ConfigDict, theirs: config_dict.ConfigDict, source: str
) -> None:
    there, here = _architecture(theirs), _architecture(config)
    differing = [
        f"{field}: {there[field]!r} there, {here[field]!r} now"
        for field in here
        if field in there and there[field] != here[field]
    ]
    if differing:
        raise UserError(f"{source} holds another backbone ({'; '.join(differing)})")


def _architecture(config: config_dict.ConfigDict) -> dict[str, Any]:
    """Returns the fields that the meaning of a backbone's tensors depends on, with defaults."""
    backbone = config.backbone
    spec = BACKBONES[backbone.name]
    found = {"backbone.name": backbone.name, "dataset.num_channels": config.dataset.num_channels}
    found["backbone.options"] = registry.options(backbone)
    defaults = {"stem": "imagenet"} | spec.sizes
    for field in ("stem", "num_heads"):
        if field in spec.fields:
            found[f"backbone.{field}"] = backbone[field] or defaults[field]
    return found


def backbone_prefixes(tensors: Tensors) -> list[str]:
    """Returns the prefix of each backbone in a file."""
    return sorted(
        {
            prefix
            for layout in _LAYOUTS
            for name in tensors
            if f".{name}".endswith(f".{layout[-1]}")
            for prefix in [name.removesuffix(layout[-1])]
            if all(prefix + part in tensors for part in layout)
        }
    )


def name_children(tensors: Tensors) -> Tensors:
    """Renames the tensors of a `Sequential` of a ResNet's children as in the ResNet itself."""
    if not all(name in tensors for name in _LAYOUTS[1]):
        return tensors
    parts = {name: name.partition(".") for name in tensors}
    return {
        _CHILDREN.get(first, first) + dot + rest: tensors[name]
        for name, (first, dot, rest) in parts.items()
    }


def _detect_backbone(tensors: Tensors, source: str) -> str:
    """Returns the name of the backbone that a state dict belongs to."""
    for name, axes in _LANDMARK_AXES.items():
        if name in tensors and tensors[name].ndim != axes:
            raise UserError(
                f"{source} fits no backbone: {name} has shape {tensors[name].shape}, expected "
                f"{axes} axes"
            )
    sizes: dict[str, Any] = {}
    if "cls_token" in tensors and "patch_embed.proj.weight" in tensors:
        sizes = {"width": tensors["cls_token"].shape[-1], "depth": _count(tensors, "blocks")}
    elif "conv1.weight" in tensors:
        stages = tuple(_count(tensors, f"layer{stage}") for stage in (1, 2, 3, 4))
        block = Bottleneck if "layer1.0.conv3.weight" in tensors else BasicBlock
        sizes = {"stage_sizes": stages, "block": block}
    for name in TIMM_NAMES if sizes else ():
        if sizes.items() <= BACKBONES[name].sizes.items():
            return name
    described = [f"{name} {getattr(size, '__name__', size)}" for name, size in sizes.items()]
    raise UserError(
        f"{source} holds none of the supported backbones ({', '.join(TIMM_NAMES)}); found "
        + (", ".join(described) or f"{len(tensors)} tensors such as {sorted(tensors)[:3]}")
    )


def _count(tensors: Tensors, module: str) -> int:
    parts = (name.split(".") for name in tensors)
    return len({part[1] for part in parts if part[0] == module and part[1:2] and part[1].isdigit()})


def _select(tensors: Tensors, prefix: str | None, source: str) -> tuple[str, Tensors]:
    """Returns a backbone's prefix and its tensors by the names of torchvision and timm."""
    examples = ", ".join(sorted(tensors)[:3]) or "none"
    if prefix is None:
        prefixes = backbone_prefixes(tensors)
        if len(prefixes) > 1:
            raise UserError(
                f"{source} holds several backbones; choose one with --prefix=: "
                + ", ".join(repr(prefix) for prefix in prefixes[:8])
            )
        if not prefixes:
            raise UserError(
                f"{source} holds no backbone in the layout of torchvision or timm; expected "
                "layer1.0.conv1.weight (or 4.0.conv1.weight, in a Sequential) or cls_token, got "
                f"the tensors {examples}"
            )
        prefix = prefixes[0]
    elif prefix:
        prefix = prefix.removesuffix(".") + "."
    selected = {x.removeprefix(prefix): tensors[x] for x in tensors if x.startswith(prefix)}
    if not selected:
        raise UserError(
            f"no tensor of {source} begins with --prefix={prefix}; its tensors: {examples}"
        )
    return prefix, name_children(selected)


def _excluded(
    config: config_dict.ConfigDict, found: Tensors, tensors: Tensors, prefix: str
) -> dict[str, int]:
    """Counts the unused tensors of a file by module."""
    used = set(torch_names(config).values())
    modules = [prefix + name.partition(".")[0] for name in unused_names(tensors, used)]
    depth = max(prefix.count("."), 1)
    others = (name for name in sorted(found) if not name.startswith(prefix))
    modules += [".".join(name.split(".")[:depth]) for name in others]
    return dict(collections.Counter(modules))


def _assumed(config: config_dict.ConfigDict) -> str:
    """Describes the properties that the features depend on and a file does not specify."""
    backbone, dataset = config.backbone, config.dataset
    if backbone.num_heads is not None:
        architecture = (
            f"{backbone.num_heads} heads, normalization before attention and perceptron with "
            f"epsilon {LAYER_NORM_EPSILON:g}, exact GELU, the class token as features"
        )
    else:
        size, stride, pools = STEMS[backbone.stem or "imagenet"]
        architecture = (
            f"a {size} x {size} stem of stride {stride} {'with' if pools else 'without'} "
            "max-pooling, strides in the 3 x 3 convolutions, batch normalization with epsilon "
            f"{BATCH_NORM_EPSILON:g}"
        )
    return (
        f"{architecture}; pixels with mean {tuple(dataset.mean)} and standard deviation "
        f"{tuple(dataset.std)}"
    )


def _num_heads(config: config_dict.ConfigDict, prefix: str, source: str) -> int | None:
    """Returns the number of attention heads; None for a ResNet."""
    default = BACKBONES[config.backbone.name].sizes.get("num_heads")
    if default is None or config.backbone.num_heads is not None:
        return config.backbone.num_heads
    if _MOCO_V3.fullmatch(prefix) or default == _MOCO_V3_HEADS:
        return _MOCO_V3_HEADS
    raise UserError(
        f"{source} does not specify the number of heads of its {config.backbone.name}: set "
        f"--config.backbone.num_heads={_MOCO_V3_HEADS} for a model of MoCo v3, "
        f"--config.backbone.num_heads={default} for one of timm"
    )


def _config_for(
    tensors: Tensors, config: config_dict.ConfigDict, source: str
) -> config_dict.ConfigDict:
    """Returns the config with the detected backbone and an identity as projection head."""
    config = config.copy_and_resolve_references()
    config.backbone.name = _detect_backbone(tensors, source)
    first = "patch_embed.proj.weight" if "cls_token" in tensors else "conv1.weight"
    channels, size = tensors[first].shape[1], tensors[first].shape[-1]
    if config.backbone.name not in TORCHVISION_NAMES:
        config.backbone.stem = None
    elif size == 7:
        config.backbone.stem = "imagenet"
    elif config.backbone.stem != "strided":  # which only the config can tell from `cifar`
        config.backbone.stem = "cifar"
    config.backbone.zero_init_residual = None
    config.projector.hidden_sizes = ()
    config.projector.output_size = make_frozen_backbone(config).num_features
    config.objective.name = _OBJECTIVE
    validate(config, training=False)  # the statistics are part of the weights
    if channels != config.dataset.num_channels:
        raise UserError(
            f"{source} takes images of {channels} channels; config.dataset.num_channels is "
            f"{config.dataset.num_channels}"
        )
    return config


def _initial_state(config: config_dict.ConfigDict, tensors: Tensors) -> TrainState:
    """Returns a state at step 0 with the tensors as backbone and the identity as head."""
    shapes = abstract_state(config, make_recipe(config, steps_per_epoch=1).optimizer)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    for tree in (state.params, state.batch_stats):
        if "backbone" in tree:
            tree["backbone"] = nested(tensors, tree["backbone"])
    head = state.params["projector"]["output"]
    head["kernel"] = np.eye(*head["kernel"].shape, dtype=np.float32)
    state = dataclasses.replace(state, guard=init_guard_state())
    return jax.device_put(state, state_shardings(shapes, make_data_mesh()))
