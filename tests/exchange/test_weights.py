"""Tensors in safetensors files and in the layout of torchvision and timm.

`reference/make_torch.py` writes the reference names and shapes.
"""

import json
import pathlib
import re
import struct

import numpy as np
import pytest
from etils import epath

from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.exchange.weights import (
    check_no_other_parts,
    from_torch,
    read_safetensors,
    tensors_by_name,
    to_torch,
    unused_names,
)
from music_jax.models.network import make_frozen_backbone

_REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
_SHAPES = json.loads((_REFERENCE / "torch_names.json").read_text())


def _config(name, size=224):
    config = default_config()
    config.backbone.name = name
    config.crop.size = config.crop.eval_resize = size
    return config


def _ours(config, make):
    backbone = make_frozen_backbone(config)
    shapes = tensors_by_name(backbone.params, backbone.batch_stats)
    return {name: make(x.shape).astype(np.float32) for name, x in shapes.items()}


@pytest.mark.parametrize("name", _SHAPES)
def test_to_torch_matches_the_names_and_shapes_of_torchvision_and_timm(name):
    config = _config(name)
    found = to_torch(config, _ours(config, np.zeros), num_classes=1000, step=7)
    assert {k: list(v.shape) for k, v in found.items()} == _SHAPES[name]
    integers = {k for k, v in found.items() if v.dtype != np.float32}
    assert integers == {k for k in found if k.endswith("num_batches_tracked")}


def test_to_torch_adds_a_classifier_of_the_given_size():
    config = _config("resnet18")
    ours = _ours(config, np.zeros)
    assert to_torch(config, ours, num_classes=10, step=0)["fc.weight"].shape == (10, 512)
    assert not [k for k in to_torch(config, ours, num_classes=0, step=0) if k.startswith("fc")]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_s16"])
def test_from_torch_inverts_to_torch(name):
    config = _config(name)
    rng = np.random.default_rng(0)
    ours = _ours(config, rng.standard_normal)
    back = from_torch(config, to_torch(config, ours, num_classes=5, step=1), "the file")
    assert back.keys() == ours.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(back[key], value)


@pytest.mark.parametrize(
    ("name", "extras"),
    [
        (
            "vit_s16",
            [
                "reg_token",
                "register_tokens",
                "dist_token",
                "fc_norm.weight",
                "norm_pre.weight",
                "blocks.3.ls1.gamma",
                "blocks.0.attn.q_norm.weight",
            ],
        ),
        (
            "resnet18",
            [
                "conv1.bias",
                "layer2.0.se.fc1.weight",
                "layer5.0.conv1.weight",
                "2.weight",  # of a Sequential, between the stem and the stages
            ],
        ),
    ],
)
def test_unused_tensors_that_would_change_the_features_are_rejected(name, extras):
    weights = {n: np.zeros(s, np.float32) for n, s in _SHAPES[name].items()}
    heads = {n for n in weights if n.startswith(("fc.", "head."))}
    used = weights.keys() - heads
    assert set(unused_names(weights, used)) == heads
    for extra in extras:
        with pytest.raises(UserError, match=f"the backbone has no {re.escape(extra)}, on"):
            check_no_other_parts(weights | {extra: np.zeros(8, np.float32)}, used, "the file")
    check_no_other_parts(weights, used, "the file")


def _raw_safetensors(path, kind, shape, content):
    described = {"dtype": kind, "shape": shape, "data_offsets": [0, len(content)]}
    header = json.dumps({"a": described}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + content)
    return epath.Path(path)


def test_float16_and_bfloat16_are_read_as_float32(tmp_path):
    values = [1.0, -0.5, 3.140625, 65504.0, 2.0**-14]
    half = np.asarray(values, np.float16).tobytes()
    tensors, _ = read_safetensors(_raw_safetensors(tmp_path / "half", "F16", [5], half))
    np.testing.assert_array_equal(tensors["a"], np.asarray(values, np.float32))
    # The upper half of the bits of a float32.
    bits = np.asarray([0x3F80, 0xC049, 0x0001], np.uint16)
    path = _raw_safetensors(tmp_path / "bfloat16", "BF16", [3], bits.tobytes())
    tensors, _ = read_safetensors(path)
    assert tensors["a"].dtype == np.float32
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(tensors["a"], expected)
    assert tensors["a"][0] == 1
    assert tensors["a"][1] == -3.140625


@pytest.mark.parametrize(
    "kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "F4"]
)
def test_unsupported_types_are_rejected(kind, tmp_path):
    size = {"C64": 64, "F4": 4}.get(kind, 8)
    path = _raw_safetensors(tmp_path / "x", kind, [8], bytes(size))
    with pytest.raises(UserError, match=f"a has the unsupported type {kind}"):
        read_safetensors(path)


def test_too_large_files_are_rejected_before_they_are_read(tmp_path):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(UserError, match=r"has 5\.0 GiB; at most 4 GiB are read"):
        read_safetensors(epath.Path(tmp_path / "sparse"))
