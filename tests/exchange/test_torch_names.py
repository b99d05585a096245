"""Weights in torchvision's and timm's layout; `reference/make_torch.py` says where from."""

import json
import pathlib

import numpy as np
import pytest
from philox_weights import philox_images, philox_weights
from safetensors.numpy import save_file

import music_jax
from music_jax.config import default_config
from music_jax.errors import UserError
from music_jax.exchange.importing import import_weights
from music_jax.exchange.tensors import by_name
from music_jax.exchange.torch_names import from_torch, to_torch
from music_jax.models.network import make_frozen_backbone
from music_jax.models.vision_transformer import sincos_positions

_REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
_SHAPES = json.loads((_REFERENCE / "torch_names.json").read_text())


def _config(name, size=224):
    config = default_config()
    config.backbone.name = name
    config.crop.size = config.crop.eval_resize = size
    return config


def _ours(config, make):
    backbone = make_frozen_backbone(config)
    found = by_name(backbone.params) | by_name(backbone.batch_stats)
    return {name: make(x.shape).astype(np.float32) for name, x in found.items()}


def _weights(name, size=64):
    """The tensors of the reference, without a classifier."""
    weights = philox_weights(
        {k: v for k, v in _SHAPES[name].items() if not k.startswith(("fc.", "head."))}
    )
    if "pos_embed" in weights:
        width = weights["pos_embed"].shape[2]
        positions = sincos_positions(size // 16, size // 16, width)
        weights["pos_embed"] = np.concatenate([np.zeros((1, width), np.float32), positions])[None]
    return weights


@pytest.mark.parametrize("name", _SHAPES)
def test_names_and_shapes_are_those_of_torchvision_and_timm(name):
    config = _config(name)
    found = to_torch(config, _ours(config, np.zeros), num_classes=1000, step=7)
    assert {k: list(v.shape) for k, v in found.items()} == _SHAPES[name]
    whole = {k for k, v in found.items() if v.dtype != np.float32}
    assert whole == {k for k in found if k.endswith("num_batches_tracked")}


def test_the_classifier_is_as_large_as_asked_for():
    config = _config("resnet18")
    ours = _ours(config, np.zeros)
    assert to_torch(config, ours, num_classes=10, step=0)["fc.weight"].shape == (10, 512)
    assert not [k for k in to_torch(config, ours, num_classes=0, step=0) if k.startswith("fc")]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "vit_s16"])
def test_there_and_back_is_the_same(name):
    config = _config(name)
    rng = np.random.default_rng(0)
    ours = _ours(config, rng.standard_normal)
    back = from_torch(config, to_torch(config, ours, num_classes=5, step=1), "the file")
    assert back.keys() == ours.keys()
    for key, value in ours.items():
        np.testing.assert_array_equal(back[key], value)


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
def test_imported_weights_give_torchs_features(name, prefix, tmp_path):
    weights = {prefix + key: value for key, value in _weights(name).items()}
    weights["module.projector.0.weight"] = np.ones((8, 8), np.float32)
    save_file(weights, tmp_path / "theirs.safetensors")
    import_weights(
        str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), _config("resnet50", 64)
    )

    encoder = music_jax.load(tmp_path / "run")
    assert encoder.trained.config.backbone.name == name
    with np.load(_REFERENCE / "torch_features.npz") as features:
        expected = features[name]
    assert not encoder.has_codes  # nothing was trained that they could come from
    params = encoder.trained.params["projector"]["output"]
    np.testing.assert_array_equal(params["kernel"], np.eye(expected.shape[1]))
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        encoder(philox_images(2, 64, 3)) / scale, expected / scale, rtol=0, atol=1e-5
    )


def _import(tmp_path, weights, **options):
    save_file(weights, tmp_path / "theirs.safetensors")
    config = options.pop("config", _config("resnet50", 64))
    return import_weights(
        str(tmp_path / "theirs.safetensors"), str(tmp_path / "run"), config, **options
    )


def test_of_several_backbones_one_is_named(tmp_path):
    one = _weights("resnet18")
    both = {f"encoder_q.{k}": v for k, v in one.items()}
    both |= {f"encoder_k.{k}": np.asarray(v + 1) for k, v in one.items()}
    with pytest.raises(UserError, match=r"several backbones.*--prefix"):
        _import(tmp_path, both)
    with pytest.raises(UserError, match=r"begins with 'teacher\.'"):
        _import(tmp_path, both, prefix="teacher.")
    assert _import(tmp_path, both, prefix="encoder_k.").backbone.name == "resnet18"


def test_a_stem_of_3_x_3_is_found_and_may_be_the_strided_one(tmp_path):
    weights = _weights("resnet18")
    weights["conv1.weight"] = weights["conv1.weight"][..., :3, :3]
    assert _import(tmp_path, weights).backbone.stem == "cifar"
    config = _config("resnet50", 64)
    config.backbone.stem = "strided"
    (tmp_path / "other").mkdir()
    assert _import(tmp_path / "other", weights, config=config).backbone.stem == "strided"


def _without(weights):
    del weights["layer3.1.bn2.running_var"]


def _one_channel(weights):
    weights["conv1.weight"] = weights["conv1.weight"][:, :1]


def _other_width(weights):
    weights["layer1.0.conv1.weight"] = np.zeros((128, 64, 3, 3), np.float32)


def _deeper(weights):
    weights["layer3.2.conv1.weight"] = weights["layer3.1.conv1.weight"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, r"no layer3\.1\.bn2\.running_var"),
        (_one_channel, "takes images of 1 channels; config.dataset.num_channels is 3"),
        (_other_width, r"layer1\.0\.conv1\.weight of shape \(128, 64, 3, 3\) in place of"),
        (_deeper, "no backbone that there is here"),
        (dict.clear, "no backbone in the layout"),
    ],
)
def test_weights_of_another_network_are_refused(change, message, tmp_path):
    weights = _weights("resnet18")
    change(weights)
    with pytest.raises(UserError, match=message):
        _import(tmp_path, weights)
    assert not (tmp_path / "run").exists()


def test_learnt_positions_are_refused(tmp_path):
    weights = _weights("vit_s16")
    weights["pos_embed"] = weights["pos_embed"] + np.float32(0.01)
    with pytest.raises(UserError, match="is a learnt one"):
        _import(tmp_path, weights)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04rest", r"is a pickle of torch's.*torch\.load"),
        (b"\x80\x02}q\x00.", "is a pickle of torch's"),
        (b"", "is no whole safetensors file"),
        (b"\xff" * 64, "is no whole safetensors file"),
    ],
)
def test_other_files_are_not_opened(content, message, tmp_path):
    (tmp_path / "theirs.pth").write_bytes(content)
    with pytest.raises(UserError, match=message):
        import_weights(str(tmp_path / "theirs.pth"), str(tmp_path / "run"), _config("resnet50"))


def test_a_file_that_was_cut_off_is_refused(tmp_path):
    save_file({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)}, tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-100])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        import_weights(str(tmp_path / "cut"), str(tmp_path / "run"), _config("resnet50"))


def test_a_run_is_not_overwritten(tmp_path):
    weights = _weights("resnet18")
    _import(tmp_path, weights)
    with pytest.raises(UserError, match="holds a run already"):
        _import(tmp_path, weights)
