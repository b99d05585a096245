"""Exported backbones give the same features in other libraries and processes."""

import json
import math
import pathlib
import subprocess
import sys
import textwrap

import jax
import numpy as np
import onnxruntime
import orbax.checkpoint as ocp
import pytest
from etils import epath
from philox_weights import philox_images
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_runs import save_run, small_config

import music_jax
from music_jax.errors import UserError
from music_jax.evaluation.protocols import provenance
from music_jax.exchange.encoder import TrainedBackbone
from music_jax.exchange.formats import _results, usage
from music_jax.exchange.weights import tensors_by_name
from music_jax.export import export

_REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
_CIFAR = {"num_channels": 3, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def _save(directory, name):
    if name == "small":
        config = small_config()
    elif name == "uneven":  # the last map, 4 x 4 of 30 pixels, is averaged over 4 x 4 cells
        config = small_config(stem="imagenet")
        config.crop.size = config.crop.eval_resize = 36
    else:
        config = small_config(name=name, stem="cifar" if name == "resnet18" else None)
        config.backbone.num_heads = 12 if name == "vit_s16" else None  # as MoCo v3's; usual are 6
        config.dataset.update(_CIFAR)
        config.crop.size = config.crop.eval_resize = 32
        config.compute_dtype = "bfloat16"
    return save_run(directory, config)


@pytest.fixture(
    scope="module",
    params=[
        "small",
        pytest.param("uneven", marks=pytest.mark.slow),
        pytest.param("resnet18", marks=pytest.mark.slow),
        pytest.param("vit_s16", marks=pytest.mark.slow),
    ],
)
def run(request, tmp_path_factory):
    """A workdir, its images and their features."""
    directory = tmp_path_factory.mktemp("run") / request.param
    _save(directory, request.param)
    encoder = music_jax.load(directory)
    images = philox_images(5, encoder.size, encoder.channels)
    return directory, images, encoder(images)


def test_a_changed_number_of_heads_is_in_the_description_and_the_card():
    config = small_config(name="vit_s16", stem=None, num_heads=12)
    config.crop.size = 32
    trained = TrainedBackbone(config, 0, {})
    assert trained.description()["config"]["backbone"] == {"name": "vit_s16", "num_heads": 12}
    call = 'vit_small_patch16_224", num_classes=0, img_size=32, num_heads=12)'
    assert call in usage(trained, "torchvision", "a.safetensors", 0)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small") / "run"
    save_run(directory, small_config())
    return directory


@pytest.fixture(scope="module")
def exported(small_run):
    """The tensors of a safetensors file, and its description."""
    path = small_run.parent / "b.safetensors"
    export(str(small_run), form="safetensors", output=str(path))
    with safe_open(path, "np") as file:
        return load_file(path), json.loads(file.metadata()["music_jax"])


def _agree(found, expected):
    assert expected.std() > 0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * max(1, np.abs(expected).max()))


def test_onnx_gives_the_same_features_for_any_batch_size(run, tmp_path):
    directory, images, expected = run
    export(str(directory), form="onnx", output=str(tmp_path / "b.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "b.onnx")
    steps = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    inputs = ((images / 255 - steps["mean"]) / steps["std"]).astype(np.float32)
    for count in (1, 5):
        batch = inputs[:count].transpose(0, 3, 1, 2)
        (found,) = session.run(["features"], {"images": batch})
        _agree(found, expected[:count])
    assert steps["center_crop"] == images.shape[1]


def test_the_code_in_the_card_of_onnx_runs(run, tmp_path, monkeypatch):
    directory, images, expected = run
    _, card = export(str(directory), form="onnx", output=str(tmp_path / "b.onnx"))
    lines = card.read_text().partition("## Use")[2].partition("## Preprocessing")[0].split("\n")
    names = {"images": images}
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(x for x in lines if x.startswith("    "))), names)
    _agree(names["features"], expected)


_RELOAD = """
import sys
import jax, jax.export
import numpy as np

with open(sys.argv[1], "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
assert not [name for name in sys.modules if name.startswith(("music_jax", "flax"))]
"""


def test_stablehlo_gives_the_same_features_in_another_process(run, tmp_path):
    directory, images, expected = run
    export(str(directory), form="stablehlo", output=str(tmp_path / "b.stablehlo"))
    np.save(tmp_path / "images.npy", images[:3])
    files = [str(tmp_path / name) for name in ("b.stablehlo", "images.npy", "features.npy")]
    subprocess.run([sys.executable, "-c", _RELOAD, *files], check=True, cwd=tmp_path)
    _agree(np.load(tmp_path / "features.npy"), expected[:3])


def test_safetensors_files_are_loaded_like_runs(run, tmp_path):
    directory, images, expected = run
    export(str(directory), form="safetensors", output=str(tmp_path / "b.safetensors"))
    encoder = music_jax.load(tmp_path / "b.safetensors")
    np.testing.assert_allclose(encoder(images), expected, rtol=1e-5, atol=1e-6)
    assert encoder.trained.step == 3
    with pytest.raises(UserError, match="codes need the projection head"):
        encoder.codes(images)


def test_orbax_holds_only_the_backbone(run, tmp_path):
    directory, _, _ = run
    path, _ = export(str(directory), form="orbax", output=str(tmp_path / "b"))
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(path)
    assert found.keys() == {"params", "batch_stats"}
    tensors = tensors_by_name(found["params"], found["batch_stats"])
    expected = music_jax.load(directory).trained.tensors
    assert tensors.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(tensors[name], value)
    with pytest.raises(UserError, match="already exists"):
        export(str(directory), form="orbax", output=str(tmp_path / "b"))


@pytest.mark.slow
def test_the_torchvision_format_can_be_loaded(tmp_path):
    config = small_config(name="resnet18", stem="imagenet")
    config.dataset.update(_CIFAR)
    save_run(tmp_path / "run", config)
    form = {"form": "torchvision", "output": str(tmp_path / "b.safetensors")}
    _, card = export(str(tmp_path / "run"), **form, num_classes=10)
    tensors = load_file(tmp_path / "b.safetensors")
    assert tensors["fc.weight"].shape == (10, 512)
    assert "torchvision.models.resnet18(num_classes=10)" in card.read_text()
    images = philox_images(2, 28, 3)
    np.testing.assert_allclose(
        music_jax.load(tmp_path / "b.safetensors")(images),
        music_jax.load(tmp_path / "run")(images),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["resnet18", pytest.param("vit_s16", marks=pytest.mark.slow)])
def test_the_timm_format_is_the_folder_that_timm_writes(name, tmp_path):
    """`reference/round_trips.py` loads such folders in timm."""
    config = small_config(name=name, stem=None)
    config.backbone.num_heads = 12 if name == "vit_s16" else None
    config.dataset.update(_CIFAR)
    config.crop.update({"size": 32, "eval_resize": 37})
    save_run(tmp_path / "run", config)
    path, card = export(str(tmp_path / "run"), form="timm", output=str(tmp_path / "b"))
    files = ["README.md", "config.json", "model.safetensors"]
    assert sorted(file.name for file in path.iterdir()) == files
    found = json.loads((path / "config.json").read_text())
    expected = json.loads((_REFERENCE / "timm_configs.json").read_text())[name]
    data, theirs = found.pop("pretrained_cfg"), expected.pop("pretrained_cfg")
    assert found == expected
    assert math.floor(32 / data["crop_pct"]) == 37  # the shorter side, as timm computes it
    assert data.pop("crop_pct") == pytest.approx(theirs.pop("crop_pct"))
    assert data.items() <= theirs.items()
    shapes = json.loads((_REFERENCE / "torch_names.json").read_text())[name]
    if name == "vit_s16":
        shapes["pos_embed"] = [1, 1 + 2 * 2, 384]
    tensors = load_file(path / "model.safetensors")
    assert {n: list(x.shape) for n, x in tensors.items()} == {
        n: shape for n, shape in shapes.items() if not n.startswith(("fc.", "head."))
    }
    assert card == path / "README.md"
    assert "library_name: timm" in card.read_text()
    assert 'timm.create_model("local-dir:b", pretrained=True)' in card.read_text()
    images = philox_images(2, 32, 3)
    np.testing.assert_allclose(
        music_jax.load(path / "model.safetensors")(images),
        music_jax.load(tmp_path / "run")(images),
        rtol=1e-5,
        atol=1e-6,
    )
    with pytest.raises(UserError, match="already exists"):
        export(str(tmp_path / "run"), form="timm", output=str(path))


@pytest.mark.parametrize(
    ("backbone", "channels", "reason"),
    [
        ({}, 1, "they have no small_resnet"),
        ({"name": "resnet18", "stem": "cifar"}, 3, "the stem 'imagenet', not 'cifar'"),
        ({"name": "resnet18", "stem": None}, 1, "takes 3 channels, not 1"),
    ],
)
def test_backbones_that_torchvision_lacks_are_rejected(backbone, channels, reason, tmp_path):
    config = small_config(**backbone)
    config.dataset.update(_CIFAR if channels == 3 else {})
    save_run(tmp_path / "run", config)
    for form in ("torchvision", "timm"):
        with pytest.raises(UserError, match=reason):
            export(str(tmp_path / "run"), form=form, output=str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_the_card_has_license_preprocessing_data_recipe_and_results(tmp_path):
    directory = tmp_path / "run"
    save_run(directory, small_config())
    linear = {"step": 3, "top1": 0.983, "raw_pixels_top1": 0.901, "num_test": 1000}
    linear |= provenance("linear", small_config(), 3)
    (directory / "linear_eval.json").write_text(json.dumps(linear))
    (directory / "knn.json").write_text(json.dumps({"step": 2, "top1": 0.5}))
    output = str(tmp_path / "b.onnx")
    _, card = export(str(directory), form="onnx", output=output, license_name="cc-by-4.0")
    text = card.read_text()
    assert card.name == "b.onnx.md"
    for part in (
        'license: "cc-by-4.0"',
        "[0.13], divided by [0.31]",
        "`mnist` (TFDS)",
        "6 segments of 5 units",
        "| linear probe, top-1 | 98.3 % | - | 90.1 % |",
        "On `mnist:test`, 1000 test images; backbone frozen",
        "from the checkpoint of step 3",
    ):
        assert part in text
    assert "kNN" not in text  # evaluated at another checkpoint
    assert jax.__version__ in text


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"top1": 0.5, "data": {"test": "/home/me/photos/"}, "num_test": 7}, "`photos`, 7 test"),
        ({"top1": 0.5, "data": "linear", "num_test": []}, "`?`, ? test"),
        ({"top1": "high", "data": {"test": 3}}, "| linear probe, top-1 | - |"),
        ("[" * 100_000, "has not been evaluated"),
    ],
)
def test_the_card_tolerates_damaged_results(record, expected, tmp_path):
    text = record if isinstance(record, str) else json.dumps({"step": 3} | record)
    (tmp_path / "linear_eval.json").write_text(text)
    assert expected in _results(epath.Path(tmp_path), 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"form": "pickle", "output": "b"}, "must be one of safetensors, torchvision, onnx"),
        ({"form": "onnx", "output": "."}, "already exists"),
        ({"form": "onnx", "output": "run/config.json/b"}, "cannot write --output"),
        ({"form": "onnx", "output": "b", "checkpoint": "7"}, "the run has the steps 3"),
        ({"form": "onnx", "output": "b", "num_classes": -1}, "must be 0 or more"),
    ],
)
def test_wrong_arguments_are_rejected(arguments, message, small_run, monkeypatch):
    monkeypatch.chdir(small_run.parent)
    with pytest.raises(UserError, match=message):
        export("run", **arguments)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("dataset", {"mean": ["a"]}, "must be a tuple of numbers"),
        ("dataset", {"std": ["a"]}, "must be a tuple of numbers"),
        ("dataset", {"num_channels": 3, "mean": [0.1] * 3, "std": [1] * 3}, "does not fit"),
        ("backbone", {"name": "resnet18"}, "does not fit the backbone"),
        ("backbone", {"name": "os.system"}, "must be one of"),
        ("crop", {"size": -1}, "must be at least 1"),
        ("extra", 1, "does not fit this version"),
    ],
)
def test_files_with_a_wrong_description_are_rejected(part, value, message, exported, tmp_path):
    tensors, described = exported
    config = described["config"]
    config = config | {part: config[part] | value if isinstance(value, dict) else value}
    save_file(tensors, tmp_path / "c", {"music_jax": json.dumps(described | {"config": config})})
    with pytest.raises(UserError, match=message):
        music_jax.load(tmp_path / "c")


@pytest.mark.parametrize("where", ["nothing", "empty", "weights.safetensors"])
def test_paths_without_a_backbone_are_rejected(where, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(UserError, match=r"neither|holds no run|was not exported"):
        music_jax.load(tmp_path / where)
