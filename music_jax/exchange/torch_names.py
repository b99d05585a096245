"""The same backbones by the names and axes of torchvision and timm.

ResNets are torchvision's `resnet18`, `resnet34` and `resnet50`, whose tensors timm calls the same;
vision transformers are timm's `vit_small_patch16_224` and `vit_base_patch16_224`. A convolution is
[out, in, y, x] there and [y, x, in, out] here, a matrix [out, in] there and [in, out] here.
"""

import re

import numpy as np
from ml_collections import config_dict

from music_jax.errors import UserError
from music_jax.exchange.tensors import Tensors, by_name, check_shapes
from music_jax.models import BACKBONES
from music_jax.models.network import make_frozen_backbone
from music_jax.models.resnet import Bottleneck
from music_jax.models.vision_transformer import sincos_positions

# What each is called there.
TORCHVISION_NAMES = {name: name for name in ("resnet18", "resnet34", "resnet50")}
TIMM_NAMES = {
    **TORCHVISION_NAMES,
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
}

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TRANSFORMER_PARTS = {
    "patches": "patch_embed.proj",
    "attention.qkv": "attn.qkv",
    "attention.output": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}
_POSITIONS = "pos_embed"
# Of the tensors that tell which backbone it is.
_LANDMARK_AXES = {"cls_token": 3, "patch_embed.proj.weight": 4, "conv1.weight": 4}

# Tensors that tell where in a file a backbone begins: by the names of torchvision and timm, and by
# those of `nn.Sequential(*list(resnet.children())[:-1])`, as lightly wraps a ResNet.
_LAYOUTS = (
    ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight"),
    ("0.weight", "1.weight", "7.0.conv1.weight", "4.0.conv1.weight"),
    ("patch_embed.proj.weight", "cls_token"),
)
_CHILDREN = {"0": "conv1", "1": "bn1"} | {f"{3 + i}": f"layer{i}" for i in (1, 2, 3, 4)}

# What a tensor beside those of the backbone is called where the features depend on it.
_PART_OF_RESNET = re.compile(r"(conv|bn|layer|stem|downsample|[0-7]\.)")
_PART_OF_TRANSFORMER = re.compile(
    r"(blocks|patch|pos_|cls_|dist_token|reg(ister)?_token|storage_token|norm|fc_norm|ln_|rope)"
)


def check_exchangeable(config: config_dict.ConfigDict) -> None:
    """Checks that torchvision or timm has this backbone.

    Raises:
      UserError: neither has; the message says what to export instead.
    """
    name, stem = config.backbone.name, config.backbone.stem
    channels = config.dataset.num_channels
    reason = None
    if name not in TIMM_NAMES:
        reason = f"neither has a {name}; they share {', '.join(TIMM_NAMES)} with this project"
    elif stem not in (None, "imagenet"):
        reason = f"their {name} has the stem 'imagenet', and this one {stem!r}"
    elif channels != 3:
        reason = f"their {name} takes 3 channels, and this one {channels}"
    if reason:
        raise UserError(
            f"torchvision and timm cannot load this backbone: {reason}. --format=onnx, stablehlo, "
            "safetensors and orbax hold any"
        )


def to_torch(
    config: config_dict.ConfigDict, tensors: Tensors, *, num_classes: int, step: int
) -> Tensors:
    """A state dict that loads with `strict=True`.

    Args:
      config: says which backbone.
      tensors: of the backbone, by our names.
      num_classes: of the classifier that the other library puts on the backbone, and which is zero
        here; 0 for none.
      step: what `num_batches_tracked` says.

    Raises:
      UserError: as `check_exchangeable`.
    """
    check_exchangeable(config)
    found = {theirs: _turned(tensors[ours], theirs) for ours, theirs in _names(config).items()}
    is_resnet = config.backbone.name in TORCHVISION_NAMES
    if is_resnet:
        for name in [name for name in found if name.endswith("running_var")]:
            found[name.replace("running_var", "num_batches_tracked")] = np.asarray(step, np.int64)
    else:
        found[_POSITIONS] = _positions(config, found["cls_token"].shape[-1])
    if num_classes:
        head = "fc" if is_resnet else "head"
        features = make_frozen_backbone(config).num_features
        found[f"{head}.weight"] = np.zeros((num_classes, features), np.float32)
        found[f"{head}.bias"] = np.zeros(num_classes, np.float32)
    return found


def from_torch(config: config_dict.ConfigDict, tensors: Tensors, where: str) -> Tensors:
    """The backbone's tensors by our names; a classifier is left out.

    Args:
      config: says which backbone.
      tensors: by their names, without a prefix.
      where: what to call them in messages.

    Raises:
      UserError: one is missing, of another shape or unknown, or the position embedding of a vision
        transformer is not MoCo v3's.
    """
    names = _names(config)
    backbone = make_frozen_backbone(config)
    expected = by_name(backbone.params) | by_name(backbone.batch_stats)
    shapes = {names[ours]: _their_shape(names[ours], x.shape) for ours, x in expected.items()}
    if "width" in BACKBONES[config.backbone.name].make.keywords:
        _check_positions(config, tensors, where)
    check_shapes(tensors, shapes, where, strict=False)
    _check_parts(tensors, set(names.values()), where)
    return {
        ours: _turned_back(tensors[theirs], theirs, expected[ours].shape)
        for ours, theirs in names.items()
    }


def unused(config: config_dict.ConfigDict, tensors: Tensors) -> list[str]:
    """Returns the names of the tensors that are none of the backbone's, such as a classifier's."""
    return _besides(tensors, set(_names(config).values()))


def _besides(tensors: Tensors, used: set[str]) -> list[str]:
    passed_over = {_POSITIONS} if "cls_token" in tensors else set()
    return [
        name
        for name in sorted(tensors.keys() - used - passed_over)
        if not name.endswith("num_batches_tracked")
    ]


def _check_parts(tensors: Tensors, used: set[str], where: str) -> None:
    """Checks that no tensor that is not used would change the features."""
    part = _PART_OF_TRANSFORMER if "cls_token" in tensors else _PART_OF_RESNET
    unknown = [name for name in _besides(tensors, used) if part.match(name)]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{where} is of another architecture: the backbone here has no {', '.join(unknown[:3])}"
            f"{more}, on which the features depend"
        )


def backbone_prefixes(tensors: Tensors) -> list[str]:
    """Returns what the names of each backbone in a file begin with."""
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


def named_children(tensors: Tensors) -> Tensors:
    """Gives the tensors of a `Sequential` of a ResNet's children the names of the children."""
    if not all(name in tensors for name in _LAYOUTS[1]):
        return tensors

    def named(name: str) -> str:
        first, dot, rest = name.partition(".")
        return _CHILDREN.get(first, first) + dot + rest

    return {named(name): tensor for name, tensor in tensors.items()}


def detect_backbone(tensors: Tensors, where: str) -> dict[str, object]:
    """Which backbone a state dict is of: `config.backbone`'s name and, of a ResNet, its stem.

    Raises:
      UserError: it is none that there is here.
    """
    for name, axes in _LANDMARK_AXES.items():
        if name in tensors and tensors[name].ndim != axes:
            raise UserError(
                f"{where} fits no backbone: {name} has the shape {tensors[name].shape}, in place "
                f"of one of {axes} axes"
            )
    found: object = None
    if "cls_token" in tensors and "patch_embed.proj.weight" in tensors:
        found = (tensors["cls_token"].shape[-1], _count(tensors, r"blocks\.(\d+)\."))
        for name, spec in BACKBONES.items():
            if (spec.make.keywords.get("width"), spec.make.keywords.get("depth")) == found:
                return {"name": name}
    elif "conv1.weight" in tensors:
        sizes = tuple(_count(tensors, rf"layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        bottleneck = "layer1.0.conv3.weight" in tensors
        found = (sizes, "bottleneck" if bottleneck else "basic")
        for name in TORCHVISION_NAMES:
            keywords = BACKBONES[name].make.keywords
            if keywords["stage_sizes"] == sizes and (keywords["block"] is Bottleneck) == bottleneck:
                stem = "imagenet" if tensors["conv1.weight"].shape[-1] == 7 else "cifar"
                return {"name": name, "stem": stem}
    raise UserError(
        f"{where} is of no backbone that there is here ({', '.join(TIMM_NAMES)}); found "
        + (f"{found}" if found else f"{len(tensors)} tensors such as {sorted(tensors)[:3]}")
    )


def _count(tensors: Tensors, pattern: str) -> int:
    numbers = {int(match[1]) for name in tensors if (match := re.match(pattern, name))}
    return len(numbers)


def _names(config: config_dict.ConfigDict) -> dict[str, str]:
    """Their name of each tensor of ours."""
    backbone = make_frozen_backbone(config)
    ours = [*by_name(backbone.params), *by_name(backbone.batch_stats)]
    keywords = BACKBONES[config.backbone.name].make.keywords
    if "stage_sizes" not in keywords:
        return {name: _transformer_name(name) for name in ours}
    places = [
        f"layer{stage + 1}.{place}"
        for stage, size in enumerate(keywords["stage_sizes"])
        for place in range(size)
    ]
    return {name: _resnet_name(name, places) for name in ours}


def _resnet_name(ours: str, places: list[str]) -> str:
    *parts, leaf = ours.split(".")
    if parts[0] != "blocks":
        module = {"conv": "conv1", "norm": "bn1"}[parts[0]]
    else:
        inner = ".".join(parts[2:])
        inner = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}.get(inner, inner)
        module = f"{places[int(parts[1])]}.{inner.replace('norm', 'bn')}"
    return f"{module}.{_LEAVES[leaf]}"


def _transformer_name(ours: str) -> str:
    if ours == "class_token":
        return "cls_token"
    *parts, leaf = ours.split(".")
    place = parts[:2] if parts[0] == "blocks" else []
    module = ".".join(parts[len(place) :])
    return ".".join([*place, _TRANSFORMER_PARTS.get(module, module), _LEAVES[leaf]])


def _turned(tensor: np.ndarray, theirs: str) -> np.ndarray:
    """A tensor of ours with their axes."""
    if theirs == "cls_token":
        return tensor.reshape(1, 1, -1)
    if theirs == "patch_embed.proj.weight":  # [(y, x, channels), width]
        return tensor.reshape(16, 16, -1, tensor.shape[1]).transpose(3, 2, 0, 1)
    if tensor.ndim == 4:
        return tensor.transpose(3, 2, 0, 1)
    return tensor.T


def _turned_back(tensor: np.ndarray, theirs: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of theirs with our axes."""
    if theirs == "patch_embed.proj.weight":
        return tensor.transpose(2, 3, 1, 0).reshape(shape)
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    return tensor.reshape(shape) if theirs == "cls_token" else tensor.T


def _their_shape(theirs: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if theirs == "cls_token":
        return (1, 1, *shape)
    if theirs == "patch_embed.proj.weight":
        return (shape[1], shape[0] // 256, 16, 16)
    return (*shape[:1:-1], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _positions(config: config_dict.ConfigDict, width: int) -> np.ndarray:
    """[1, 1 + patches, width]: nothing for the class token."""
    side = config.crop.size // 16
    positions = sincos_positions(side, side, width)
    return np.concatenate([np.zeros((1, width), np.float32), positions])[None]


def _check_positions(config: config_dict.ConfigDict, tensors: Tensors, where: str) -> None:
    found = tensors.get(_POSITIONS)
    if found is None or found.ndim != 3 or found.shape[1] < 2:
        raise UserError(f"{where} has no {_POSITIONS} of the shape (1, 1 + patches, width)")
    side = round((found.shape[1] - 1) ** 0.5)
    there = config.copy_and_resolve_references()
    there.crop.size = 16 * side
    expected = _positions(there, BACKBONES[config.backbone.name].make.keywords["width"])
    if found.shape != expected.shape or np.abs(found - expected).max() > 1e-3:
        raise UserError(
            f"the position embedding of {where} is a learned or another one; vision transformers "
            "here have the fixed sine-cosine one of MoCo v3"
        )


def input_channels(tensors: Tensors) -> int:
    """Channels of the images that a state dict's first layer takes."""
    name = "patch_embed.proj.weight" if "cls_token" in tensors else "conv1.weight"
    return tensors[name].shape[1]
