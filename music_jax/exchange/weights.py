"""Weights as tensors by name: in safetensors files, and in the layout of torchvision and timm.

ResNets match torchvision's `resnet18`, `resnet34` and `resnet50`, whose tensors have the same names
in timm; vision transformers match timm's `vit_small_patch16_224` and `vit_base_patch16_224`. Their
convolutions are [out, in, y, x] and ours [y, x, in, out]; their matrices are [out, in] and ours
[in, out].
"""

import re
from typing import Any

import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import config_dict
from ml_dtypes import bfloat16

from music_jax.errors import UserError, first_of, require_extra
from music_jax.models import BACKBONES
from music_jax.models.network import make_frozen_backbone
from music_jax.models.vision_transformer import sincos_positions
from music_jax.workdir.files import check_is_file

Tensors = dict[str, np.ndarray]

# Converts a .pth file, which is a pickle, with torch.
CONVERT_COMMAND = (
    'python -c "import sys, torch, safetensors.torch as s; '
    "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "d = d.get('model', d.get('state_dict', d)); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items() if torch.is_tensor(v)}, "
    'sys.argv[2])" FILE.pth FILE.safetensors'
)

# Supported types of safetensors. Types of 8 bits and fewer need scales, which each program stores
# in its own way.
_TYPES = {"F64", "F32", "F16", "BF16", "I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL"}
_MAX_BYTES = 1 << 32  # ten times the largest backbone with its optimizer state

TORCHVISION_NAMES = {name: name for name in ("resnet18", "resnet34", "resnet50")}
TIMM_NAMES = {
    **TORCHVISION_NAMES,
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
}

# Regular expressions for parts of our names and what replaces them in theirs, in this order.
_RESNET_PARTS = {
    r"^conv\.": "conv1.",
    r"^norm\.": "bn1.",
    r"\bshortcut\.conv\b": "downsample.0",
    r"\bshortcut\.norm\b": "downsample.1",
    r"\bnorm(\d)\b": r"bn\1",
}
_TRANSFORMER_PARTS = {
    r"^class_token$": "cls_token",
    r"^patches\b": "patch_embed.proj",
    r"\battention\.qkv\b": "attn.qkv",
    r"\battention\.output\b": "attn.proj",
    r"\bmlp_in\b": "mlp.fc1",
    r"\bmlp_out\b": "mlp.fc2",
}
_LEAVES = {r"\.(kernel|scale)$": ".weight", r"\.(mean|var)$": r".running_\1"}
_POSITIONS = "pos_embed"

# Unused tensors with these names would change the features.
_RESNET_TENSORS = re.compile(r"(conv|bn|layer|stem|downsample|[0-7]\.)")
_TRANSFORMER_TENSORS = re.compile(
    r"(blocks|patch|pos_|cls_|dist_token|reg(ister)?_token|storage_token|norm|fc_norm|ln_|rope)"
)


def read_safetensors(path: epath.Path) -> tuple[Tensors, dict[str, str]]:
    """Reads the tensors of a file, floating-point ones as float32, and its metadata.

    Reading a safetensors file runs no code from it, unlike a pickle.

    Raises:
      UserError: The file is missing, is not a safetensors file, is too large, or has tensors of an
        unsupported type.
    """
    with require_extra("export"):
        from safetensors import SafetensorError, safe_open
    try:
        check_is_file(path)
        size = path.stat().length
        with path.open("rb") as file:
            start = file.read(2)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if start in (b"PK", b"\x80\x02"):
        raise UserError(
            f"{path} is a torch pickle, which can run code when it is read and is not opened; "
            f"convert it to safetensors where torch is installed: {CONVERT_COMMAND}"
        )
    if size > _MAX_BYTES:
        raise UserError(
            f"{path} has {size / 2**30:.1f} GiB; at most {_MAX_BYTES >> 30} GiB are read. Save the "
            "backbone's tensors alone to a file"
        )
    try:
        with safe_open(str(path), framework="np") as file:
            tensors = {}
            for name in list(file.keys()):
                if (kind := file.get_slice(name).get_dtype()) not in _TYPES:
                    raise UserError(
                        f"{path}: {name} has the unsupported type {kind}; save it as float32 or "
                        "bfloat16"
                    )
                tensor = file.get_tensor(name)
                if tensor.dtype == bfloat16 or np.issubdtype(tensor.dtype, np.floating):
                    tensor = tensor.astype(np.float32)
                tensors[name] = tensor
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{path} is not a valid safetensors file: {error}") from error


def check_shapes(
    tensors: Tensors, expected: dict[str, tuple[int, ...]], source: str, *, strict: bool = True
) -> None:
    """Checks that tensors have the expected shapes and a floating-point type.

    Raises:
      UserError: A tensor is missing, has the wrong shape or type, or (if strict) is unknown.
    """
    wrong = []
    for name, shape in expected.items():
        x = tensors.get(name)
        if x is None:
            wrong.append(f"no {name}")
        elif x.shape != shape:
            wrong.append(f"{name} has shape {x.shape}, expected {shape}")
        elif x.dtype != np.float32:
            wrong.append(f"{name} has type {x.dtype}, expected a floating-point type")
    if strict:
        wrong += [f"unknown tensor {name}" for name in tensors if name not in expected]
    if wrong:
        reasons = first_of(wrong, separator="; ")
        raise UserError(f"{source} does not fit the backbone: {reasons}")


def tensors_by_name(*trees: Any) -> dict[str, Any]:
    """Returns the leaves of nested dictionaries by dotted name."""
    return {
        ".".join(map(str, path)): leaf
        for tree in trees
        for path, leaf in flatten_dict(tree).items()
    }


def nested(tensors: Tensors, tree: Any) -> Any:
    """Returns the tensors with the names in a tree as a tree; inverts `tensors_by_name`."""
    return unflatten_dict({path: tensors[".".join(map(str, path))] for path in flatten_dict(tree)})


def check_exchangeable(config: config_dict.ConfigDict) -> None:
    """Checks that torchvision or timm has a backbone.

    Raises:
      UserError: Neither library has it.
    """
    name, stem = config.backbone.name, config.backbone.stem
    channels = config.dataset.num_channels
    reason = None
    if name not in TIMM_NAMES:
        reason = f"they have no {name}; supported are {', '.join(TIMM_NAMES)}"
    elif stem not in (None, "imagenet"):
        reason = f"their {name} has the stem 'imagenet', not {stem!r}"
    elif channels != 3:
        reason = f"their {name} takes 3 channels, not {channels}"
    if reason:
        raise UserError(
            f"torchvision and timm cannot load this backbone: {reason}. Use --format="
            + ("" if BACKBONES[name].is_registered else "onnx, ")
            + "stablehlo, safetensors or orbax"
        )


def to_torch(
    config: config_dict.ConfigDict, tensors: Tensors, *, num_classes: int, step: int
) -> Tensors:
    """Converts a backbone to a state dict that loads with `strict=True`.

    Args:
      config: Config of the backbone.
      tensors: Tensors of the backbone by our names.
      num_classes: Number of classes of the classifier, which is zero; 0 for no classifier.
      step: Value of `num_batches_tracked`.

    Raises:
      UserError: See `check_exchangeable`.
    """
    check_exchangeable(config)
    state = {
        theirs: _to_torch_axes(tensors[x], theirs) for x, theirs in torch_names(config).items()
    }
    is_resnet = config.backbone.name in TORCHVISION_NAMES
    if is_resnet:
        for name in [name for name in state if name.endswith("running_var")]:
            state[name.replace("running_var", "num_batches_tracked")] = np.asarray(step, np.int64)
    else:
        state[_POSITIONS] = _positions(config.crop.size // 16, state["cls_token"].shape[-1])
    if num_classes:
        head = "fc" if is_resnet else "head"
        features = make_frozen_backbone(config).num_features
        state[f"{head}.weight"] = np.zeros((num_classes, features), np.float32)
        state[f"{head}.bias"] = np.zeros(num_classes, np.float32)
    return state


def from_torch(config: config_dict.ConfigDict, tensors: Tensors, source: str) -> Tensors:
    """Converts a state dict to the backbone's tensors by our names, without its classifier.

    Args:
      config: Config of the backbone.
      tensors: State dict, without a prefix of the names.
      source: Name of the tensors' origin for messages.

    Raises:
      UserError: A tensor is missing, has the wrong shape or is unknown, or the position embedding
        of a vision transformer is not that of MoCo v3.
    """
    names = torch_names(config)
    backbone = make_frozen_backbone(config)
    ours = tensors_by_name(backbone.params, backbone.batch_stats)
    like = {names[name]: np.broadcast_to(np.float32(0), x.shape) for name, x in ours.items()}
    shapes = {theirs: _to_torch_axes(x, theirs).shape for theirs, x in like.items()}
    if "width" in BACKBONES[config.backbone.name].sizes:
        _check_positions(config, tensors, source)
    check_shapes(tensors, shapes, source, strict=False)
    check_no_other_parts(tensors, set(names.values()), source)
    return {
        name: _from_torch_axes(tensors[names[name]], names[name], x.shape)
        for name, x in ours.items()
    }


def unused_names(tensors: Tensors, used: set[str]) -> list[str]:
    """Returns the names of the tensors that do not belong to the backbone, such as a classifier."""
    ignored = {_POSITIONS} if "cls_token" in tensors else set()
    return [
        name
        for name in sorted(tensors.keys() - used - ignored)
        if not name.endswith("num_batches_tracked")
    ]


def check_no_other_parts(tensors: Tensors, used: set[str], source: str) -> None:
    """Checks that no unused tensor would change the features.

    Raises:
      UserError: An unused tensor would.
    """
    changing = _TRANSFORMER_TENSORS if "cls_token" in tensors else _RESNET_TENSORS
    unknown = [name for name in unused_names(tensors, used) if changing.match(name)]
    if unknown:
        raise UserError(
            f"{source} has another architecture: the backbone has no {first_of(unknown)}, on which "
            "the features depend"
        )


def torch_names(config: config_dict.ConfigDict) -> dict[str, str]:
    """Returns the name in torchvision and timm of each tensor of a backbone."""
    backbone = make_frozen_backbone(config)
    stages = BACKBONES[config.backbone.name].sizes.get("stage_sizes", ())
    blocks = [f"layer{i}.{block}" for i, size in enumerate(stages, 1) for block in range(size)]
    parts = {rf"^blocks\.{i}\b": block for i, block in enumerate(blocks)}
    parts |= (_RESNET_PARTS if stages else _TRANSFORMER_PARTS) | _LEAVES
    names = {}
    for name in tensors_by_name(backbone.params, backbone.batch_stats):
        theirs = name
        for ours, replacement in parts.items():
            theirs = re.sub(ours, replacement, theirs)
        names[name] = theirs
    return names


def _to_torch_axes(tensor: np.ndarray, theirs: str) -> np.ndarray:
    if theirs == "cls_token":
        return tensor.reshape(1, 1, -1)
    if theirs == "patch_embed.proj.weight":  # [(y, x, channels), width]
        tensor = tensor.reshape(16, 16, -1, tensor.shape[1])
    return tensor.transpose(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T


def _from_torch_axes(tensor: np.ndarray, theirs: str, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.ndim == 4:
        tensor = tensor.transpose(2, 3, 1, 0)
    elif theirs != "cls_token":
        tensor = tensor.T
    return tensor.reshape(shape)


def _positions(side: int, width: int) -> np.ndarray:
    """Returns the position embedding [1, 1 + patches, width]; the class token's is zero."""
    positions = sincos_positions(side, side, width)
    return np.concatenate([np.zeros((1, width), np.float32), positions])[None]


def _check_positions(config: config_dict.ConfigDict, tensors: Tensors, source: str) -> None:
    found = tensors.get(_POSITIONS)
    if found is None or found.ndim != 3 or found.shape[1] < 2:
        raise UserError(f"{source} has no {_POSITIONS} of shape (1, 1 + patches, width)")
    side = round((found.shape[1] - 1) ** 0.5)
    expected = _positions(side, BACKBONES[config.backbone.name].sizes["width"])
    if found.shape != expected.shape or np.abs(found - expected).max() > 1e-3:
        raise UserError(
            f"the position embedding of {source} is learned or of another kind; only the fixed "
            "sine-cosine embedding of MoCo v3 is supported"
        )
