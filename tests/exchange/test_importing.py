"""Importing weights in the layout of torchvision and timm as a run.

`reference/make_torch.py` writes the reference features.
"""

import functools
import json
import os
import pathlib

import numpy as np
import pytest
from flax import nnx
from philox_weights import philox_images, philox_weights
from safetensors.numpy import save_file
from small_runs import save_run, small_config

import music_jax
from music_jax.config import default_config, validate
from music_jax.errors import UserError
from music_jax.exchange import importing
from music_jax.exchange.importing import backbone_prefixes, import_backbone, name_children
from music_jax.exchange.weights import from_torch
from music_jax.models.network import make_frozen_backbone
from music_jax.models.vision_transformer import sincos_positions

_REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
_SHAPES = json.loads((_REFERENCE / "torch_names.json").read_text())


def _config(name, size=224):
    config = default_config()
    config.backbone.name = name
    config.crop.size = config.crop.eval_resize = size
    return config


@functools.cache
def _cached_weights(name, size):
    weights = philox_weights(
        {k: v for k, v in _SHAPES[name].items() if not k.startswith(("fc.", "head."))}
    )
    if "pos_embed" in weights:
        width = weights["pos_embed"].shape[2]
        positions = sincos_positions(size // 16, size // 16, width)
        weights["pos_embed"] = np.concatenate([np.zeros((1, width), np.float32), positions])[None]
    return weights


def _weights(name, size=64):
    """Returns the tensors of the reference, without a classifier."""
    return dict(_cached_weights(name, size))


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("resnet18", ""),
        pytest.param("resnet34", "model.", marks=pytest.mark.slow),
        # As Barlow Twins and VICReg save a whole checkpoint.
        pytest.param("resnet50", "module.backbone.", marks=pytest.mark.slow),
        pytest.param("vit_s16", "", marks=pytest.mark.slow),
    ],
)
def test_imported_weights_give_the_features_of_torch(name, prefix, tmp_path):
    weights = {prefix + key: value for key, value in _weights(name).items()}
    weights["module.projector.0.weight"] = np.ones((8, 8), np.float32)
    save_file(weights, tmp_path / "theirs.safetensors")
    config = _config("resnet50", 64)
    if name == "vit_s16":
        config.backbone.num_heads = 6  # timm's
    import_backbone(str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), config)

    encoder = music_jax.load(tmp_path / "run")
    assert encoder.trained.config.backbone.name == name
    with np.load(_REFERENCE / "torch_features.npz") as features:
        expected = features[name]
    assert not encoder.has_codes
    params = encoder.trained.params["projector"]["output"]
    np.testing.assert_array_equal(params["kernel"], np.eye(expected.shape[1]))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        encoder(philox_images(2, 64, 3)) / scale, expected / scale, rtol=0, atol=1e-5
    )


def _import(tmp_path, weights, **options):
    save_file(weights, tmp_path / "theirs.safetensors")
    config = options.pop("config", _config("resnet50", 64))
    imported = import_backbone(
        str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), config, **options
    )
    return imported.config


def _convert(weights):
    """Imports weights in memory, without a file and a run."""
    config = importing._config_for(weights, _config("resnet50", 64), "the file")
    return from_torch(config, weights, "the file")


def test_a_prefix_selects_one_of_several_backbones(tmp_path):
    one = _weights("resnet18")
    both = {f"encoder_q.{k}": v for k, v in one.items()}
    both |= {f"encoder_k.{k}": np.asarray(v + 1) for k, v in one.items()}
    with pytest.raises(UserError, match=r"--prefix=: 'encoder_k\.', 'encoder_q\.'"):
        _import(tmp_path, both)
    with pytest.raises(UserError, match=r"begins with --prefix=teacher\."):
        _import(tmp_path, both, prefix="teacher.")
    assert _import(tmp_path, both, prefix="encoder_k").backbone.name == "resnet18"


_CHILDREN = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}


def _as_children(weights, numbers=_CHILDREN):
    """Renames tensors as `nn.Sequential(*list(resnet.children())[:-1])` does."""
    parts = {name: name.partition(".") for name in weights}
    return {f"{numbers[first]}.{rest}": weights[n] for n, (first, _, rest) in parts.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "module.",
        "model.",
        "state_dict.",
        "backbone.",  # lightly, solo-learn
        "encoder.",
        "encoder_q.",
        "module.backbone.",  # Barlow Twins, VICReg
        "student.backbone.",
        "teacher.backbone.",
        "model.backbone._orig_mod.",
    ],
)
def test_a_backbone_is_found_below_any_prefix_by_names_or_child_numbers(prefix):
    one = np.zeros(1, np.float32)
    heads = {f"{prefix}fc.weight": one, "projection_head.layers.0.weight": one, "queue": one}
    resnet = dict.fromkeys((n for n in _SHAPES["resnet18"] if not n.startswith("fc.")), one)
    for tensors in (resnet, _as_children(resnet)):
        found = heads | {prefix + name: x for name, x in tensors.items()}
        assert backbone_prefixes(found) == [prefix]
        assert name_children(tensors).keys() == resnet.keys()
    transformer = {prefix + name: one for name in _SHAPES["vit_s16"]}
    assert backbone_prefixes(heads | transformer) == [prefix]


def test_a_backbone_wrapped_by_lightly_is_imported_like_that_of_torchvision(tmp_path):
    weights = _weights("resnet18")
    wrapped = {f"backbone.{n}": x for n, x in _as_children(weights).items()}
    wrapped |= {"backbone.9.weight": np.ones((2, 512), np.float32)}  # behind the pooling
    wrapped |= {f"projection_head.{i}.weight": np.ones((8, 8), np.float32) for i in range(2)}
    save_file(wrapped, tmp_path / "theirs.safetensors")
    found = import_backbone(
        str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), _config("resnet50", 64)
    )
    assert (found.config.backbone.name, found.config.backbone.stem) == ("resnet18", "imagenet")
    assert found.excluded == {"backbone.9": 1, "projection_head": 2}
    assert "a 7 x 7 stem of stride 2 with max-pooling" in found.assumed
    kept = json.loads((tmp_path / "run" / "imported.json").read_text())
    assert (kept["prefix"], kept["excluded"]) == ("backbone.", found.excluded)
    assert kept["assumed"] == found.assumed
    expected = from_torch(found.config, weights, "the file")
    trained = music_jax.load(tmp_path / "run").trained
    assert trained.tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(trained.tensors[name], value)


def test_the_resnet_of_lightlys_generator_is_rejected(tmp_path):
    # Its children lack the ReLU behind the stem, so as a Sequential it is another network.
    numbers = {"conv1": "0", "bn1": "1", "layer1": "2", "layer2": "3", "layer3": "4", "layer4": "5"}
    with pytest.raises(UserError, match="no backbone in the layout"):
        _import(tmp_path, _as_children(_weights("resnet18"), numbers))


@pytest.mark.parametrize(
    ("name", "prefix", "heads"),
    [
        ("vit_s16", "module.base_encoder.", 12),
        ("vit_s16", "module.momentum_encoder.", 12),
        ("vit_s16", "base_encoder.", 12),
        ("vit_b16", "", 12),
        ("resnet18", "module.base_encoder.", None),
    ],
)
def test_the_heads_of_moco_v3_are_recognized(name, prefix, heads):
    config = _config(name)
    assert importing._num_heads(config, prefix, "the file") == heads
    if heads:
        config.backbone.num_heads = 3
        assert importing._num_heads(config, prefix, "the file") == 3


@pytest.mark.parametrize("prefix", ["", "module.", "teacher.backbone.", "encoder_q."])
def test_an_undetermined_number_of_heads_is_an_error(prefix):
    message = r"num_heads=12 for a model of MoCo v3, .*num_heads=6 for one of timm"
    with pytest.raises(UserError, match=message):
        importing._num_heads(_config("vit_s16"), prefix, "the file")


@pytest.mark.slow
def test_a_moco_v3_file_becomes_a_run_with_12_heads(tmp_path):
    weights = {f"module.base_encoder.{n}": x for n, x in _weights("vit_s16").items()}
    weights["module.base_encoder.head.0.weight"] = np.ones((8, 384), np.float32)
    weights |= {f"module.momentum_encoder.{n}": x for n, x in _weights("vit_s16").items()}
    with pytest.raises(UserError, match="several backbones"):
        _import(tmp_path, weights)
    _import(tmp_path, weights, prefix="module.base_encoder.")
    assert music_jax.load(tmp_path / "run").trained.config.backbone.num_heads == 12


def test_the_number_of_heads_reaches_the_network_and_divides_its_width():
    config = _config("vit_s16")
    for given, expected in ((None, 6), (12, 12)):
        config.backbone.num_heads = given
        backbone = make_frozen_backbone(config)
        module = nnx.merge(backbone.graph.definition, backbone.params, backbone.batch_stats, {})
        assert {block.attention.num_heads for block in module.blocks} == {expected}
    for wrong in (0, 5, -6):
        config.backbone.num_heads = wrong
        with pytest.raises(UserError, match=r"num_heads must divide vit_s16's width, 384"):
            validate(config)


def test_an_architecture_with_additional_parts_is_rejected(tmp_path):
    weights = _weights("resnet18") | {"layer2.0.se.fc1.weight": np.zeros(8, np.float32)}
    with pytest.raises(UserError, match=r"the backbone has no layer2\.0\.se\.fc1\.weight"):
        _import(tmp_path, weights)
    assert not (tmp_path / "run").exists()


def test_a_3_x_3_stem_is_detected_and_can_be_declared_strided():
    weights = _weights("resnet18")
    weights["conv1.weight"] = weights["conv1.weight"][..., :3, :3]
    config = _config("resnet50", 64)
    for stem, expected in ((None, "cifar"), ("imagenet", "cifar"), ("strided", "strided")):
        config.backbone.stem = stem
        detected = importing._config_for(weights, config, "the file")
        assert (detected.backbone.name, detected.backbone.stem) == ("resnet18", expected)


def _without(weights):
    del weights["layer3.1.bn2.running_var"]


def _one_channel(weights):
    weights["conv1.weight"] = weights["conv1.weight"][:, :1]


def _other_width(weights):
    weights["layer1.0.conv1.weight"] = np.zeros((128, 64, 3, 3), np.float32)


def _deeper(weights):
    weights["layer3.2.conv1.weight"] = weights["layer3.1.conv1.weight"]


def _set(name, value):
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _set("conv1.weight", np.zeros((), np.float32)),
            r"conv1\.weight has shape \(\), expected 4 axes",
        ),
        (
            _set("conv1.weight", np.ones((64, 3), np.float32)),
            r"shape \(64, 3\), expected 4 axes",
        ),
        (
            _set("bn1.weight", np.zeros((), np.float32)),
            r"bn1\.weight has shape \(\), expected \(64,\)",
        ),
        (
            _set("bn1.weight", np.ones(64, np.int64)),
            r"bn1\.weight has type int64, expected a float",
        ),
        (_set("bn1.weight", np.ones(64, bool)), r"bn1\.weight has type bool, expected a floating"),
        (_without, r"no layer3\.1\.bn2\.running_var"),
        (_one_channel, "takes images of 1 channels; config.dataset.num_channels is 3"),
        (_other_width, r"layer1\.0\.conv1\.weight has shape \(128, 64, 3, 3\), expected"),
        (_deeper, "none of the supported backbones"),
        (dict.clear, "no backbone in the layout"),
    ],
)
def test_weights_of_other_networks_are_rejected(change, message, tmp_path):
    weights = _weights("resnet18")
    change(weights)
    with pytest.raises(UserError, match=message):
        _import(tmp_path, weights)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("cls_token", (), r"cls_token has shape \(\), expected 3 axes"),
        ("patch_embed.proj.weight", (384, 768), "expected 4 axes"),
        ("pos_embed", (), "has no pos_embed of shape"),
        ("pos_embed", (1, 0, 384), "has no pos_embed of shape"),
        ("pos_embed", (1, 197, 5), "is learned or of another kind"),
        ("pos_embed", (1, 7, 384), "is learned or of another kind"),
    ],
)
def test_transformers_with_wrong_shapes_are_rejected(name, shape, message):
    weights = _weights("vit_s16")
    weights[name] = np.zeros(shape, np.float32)
    with pytest.raises(UserError, match=message):
        _convert(weights)


def _fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    "make", [_fifo, pathlib.Path.mkdir, lambda path: path.symlink_to("/dev/zero")]
)
def test_paths_that_are_not_regular_files_are_rejected_without_blocking(make, tmp_path):
    make(tmp_path / "theirs")
    with pytest.raises(UserError, match="is not a regular file"):
        import_backbone(str(tmp_path / "theirs"), str(tmp_path / "run"), _config("resnet50"))
    assert not (tmp_path / "run").exists()


def test_learned_positions_are_rejected():
    weights = _weights("vit_s16")
    weights["pos_embed"] = weights["pos_embed"] + np.float32(0.01)
    with pytest.raises(UserError, match="is learned or of another kind"):
        _convert(weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", r"is a torch pickle.*torch\.load"),
        (b"\x80\x02}q\x00.", "is a torch pickle"),
        (b"", "is not a valid safetensors file"),
        (b"\xff" * 64, "is not a valid safetensors file"),
    ],
)
def test_files_of_other_formats_are_rejected(content, message, tmp_path):
    (tmp_path / "theirs.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_backbone(str(tmp_path / "theirs.pth"), str(tmp_path / "run"), _config("resnet50"))


def test_truncated_files_are_rejected(tmp_path):
    save_file({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        import_backbone(str(tmp_path / "cut"), str(tmp_path / "run"), _config("resnet50"))


def test_a_run_is_not_overwritten(tmp_path):
    weights = _weights("resnet18")
    save_run(tmp_path / "run", small_config())
    with pytest.raises(UserError, match="already holds a run"):
        _import(tmp_path, weights)


def test_a_tensor_named_like_a_module_is_one_clear_error(tmp_path):
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "layer1": (3,)}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(UserError):
        _import(tmp_path, weights)
