"""The backbone that a training starts from: its features, its first loss, and what does not fit.

`reference/make_torch.py` writes the reference features.
"""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from listed_records import list_source
from philox_weights import philox_images, philox_weights
from safetensors.numpy import load_file, save_file
from small_runs import save_run, small_config

import music_jax
from music_jax.config import default_config
from music_jax.data.augment import normalize_images
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.errors import UserError
from music_jax.evaluation.online import OnlineEvaluation
from music_jax.evaluation.run import load_run
from music_jax.exchange.importing import import_backbone, initial_backbone
from music_jax.export import export
from music_jax.metrics.knn import knn_predict
from music_jax.metrics.label_free import rankme
from music_jax.models.network import Network
from music_jax.models.vision_transformer import sincos_positions
from music_jax.registry import BACKBONES
from music_jax.train.loop import _first_state
from music_jax.train.recipe import make_recipe
from music_jax.train.state import init_state
from music_jax.train.step import augmented_views, compile_step

_REFERENCE = pathlib.Path(__file__).parents[1] / "reference"
_SHAPES = json.loads((_REFERENCE / "torch_names.json").read_text())


def _theirs(name, path, prefix="", size=64):
    """Writes the tensors of the reference, with their classifier, under a prefix."""
    weights = philox_weights(_SHAPES[name])
    if "pos_embed" in weights:
        width = weights["pos_embed"].shape[2]
        positions = sincos_positions(size // 16, size // 16, width)
        weights["pos_embed"] = np.concatenate([np.zeros((1, width), np.float32), positions])[None]
    save_file({prefix + name: x for name, x in weights.items()}, path)


def _config(name, source="", size=64):
    config = default_config()
    config.backbone.update({"name": name, "init_from": str(source)})
    config.crop.size = config.crop.eval_resize = size
    config.batch_size = 4
    config.projector.hidden_sizes = (16,)
    config.objective.update({"num_segments": 4, "units_per_segment": 4})
    return config


def _export_resnet18(directory):
    _theirs("resnet18", directory / "theirs")
    import_backbone(str(directory / "theirs"), str(directory / "run"), _config("resnet50"))
    output = str(directory / "b.safetensors")
    export(str(directory / "run"), form="safetensors", output=output)
    return _config("resnet18", output)


def _write_vit_s16(directory):
    _theirs("vit_s16", directory / "b.safetensors")
    config = _config("vit_s16", directory / "b.safetensors")
    config.backbone.num_heads = 6
    import_backbone(str(directory / "b.safetensors"), str(directory / "run"), config)
    return config


@pytest.mark.slow
@pytest.mark.parametrize("write", [_export_resnet18, _write_vit_s16])
def test_the_first_loss_and_the_features_are_those_of_the_imported_network(write, tmp_path):
    config, mesh = write(tmp_path), make_data_mesh()
    config.seed = 7
    recipe = make_recipe(config, steps_per_epoch=5)
    random = init_state(config, recipe.optimizer, mesh)
    state = _first_state(config, recipe, mesh, initial_backbone(config))
    for old, new in zip(*map(jax.tree.leaves, (random, state)), strict=True):
        assert (new.sharding, new.dtype, new.shape) == (old.sharding, old.dtype, old.shape)
    projectors = (random.params["projector"], state.params["projector"])
    jax.tree.map(np.testing.assert_array_equal, *projectors)
    # Features of torch, which are then the neighbors.
    with np.load(_REFERENCE / "torch_features.npz") as reference:
        expected = reference[config.backbone.name]
    scale = np.abs(expected).max()
    images = philox_images(2, 64, 3)
    normalized = normalize_images(images, mean=config.dataset.mean, std=config.dataset.std)
    features = jax.jit(recipe.network.features)(state.params, state.batch_stats, normalized)
    np.testing.assert_allclose(features / scale, expected / scale, rtol=0, atol=1e-5)
    found = knn_predict(
        expected, np.arange(2), np.asarray(features), num_classes=2, k=(1,), temperature=0.07
    )
    assert found.tolist() == [[0, 1]]

    # What a training measures before its first step, against the imported network.
    images_of_classes = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), np.uint8)
    images_of_classes[::2, 16:48, 16:48] //= 4
    labels = np.arange(30) % 2
    records = [{"image": x, "label": y} for x, y in zip(images_of_classes, labels, strict=True)]
    config.knn.k, config.evaluation.batch_size = 1, 32
    source = list_source("squares", records, num_classes=2)
    evaluation = OnlineEvaluation(config, source, recipe.network, mesh, None)
    measured = evaluation(state.params, state.batch_stats)
    imported = np.asarray(music_jax.load(tmp_path / "run")(images_of_classes))
    bank, queries = (np.flatnonzero(x) for x in (~evaluation._is_query, evaluation._is_query))
    predicted = knn_predict(imported[bank], labels[bank], imported[queries], num_classes=2, k=1)
    assert measured["online_knn"] == np.mean(predicted == labels[queries])
    np.testing.assert_allclose(measured["online_rankme"], rankme(imported), rtol=1e-3)
    untrained = evaluation(random.params, random.batch_stats)
    assert abs(untrained["online_rankme"] / measured["online_rankme"] - 1) > 1e-2

    # The loss of the network in the file, which `load` reads.
    batch = np.stack([images, images[::-1]], axis=1).repeat(2, axis=0), np.arange(4, dtype="uint32")
    weights = initial_backbone(config)
    if write is _export_resnet18:
        weights = [
            {"backbone": x} for x in music_jax.load(tmp_path / "run").trained.backbone_arrays()
        ]
    loaded = random.params | weights[0], random.batch_stats | weights[1]
    loss = _loss(recipe, *loaded, *batch)
    random_loss = _loss(recipe, random.params, random.batch_stats, *batch)
    assert abs(random_loss - loss) > 1e-3 * abs(loss)
    batch = jax.device_put(batch, batch_sharding(mesh))
    _, metrics = compile_step(recipe, state, mesh)(state, *batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)


def _loss(recipe, params, batch_stats, images, index):
    views = augmented_views(recipe, images, index)
    _, embeddings, _ = jax.jit(recipe.network.embed)(params, batch_stats, views)
    return float(recipe.objective(embeddings[:, 0], embeddings[:, 1])[0])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run of a small backbone, and its export."""
    directory = tmp_path_factory.mktemp("small")
    save_run(directory / "run", small_config())
    export(str(directory / "run"), form="safetensors", output=str(directory / "b.safetensors"))
    return directory


def _small(source, **backbone):
    return small_config(init_from=str(source), **backbone)


def _same_tensors(found, path):
    expected = music_jax.load(path).trained.tensors
    found = {".".join(map(str, k)): x for tree in found for k, x in flatten_dict(tree).items()}
    assert found.keys() == {f"backbone.{name}" for name in expected}
    for name, value in expected.items():
        np.testing.assert_array_equal(found[f"backbone.{name}"], value)


def test_a_run_and_its_export_are_reported_in_one_line(small, capsys):
    for name, layout, rest in (
        ("run", "run, step 3", "projector (5)"),
        ("b.safetensors", "layout of music_jax", "nothing"),
    ):
        _same_tensors(initial_backbone(_small(small / name)), small / "run")
        (line,) = capsys.readouterr().out.splitlines()
        count = len(music_jax.load(small / "run").trained.tensors)
        assert f"{small / name} ({layout}): {count} tensors" in line
        assert line.endswith(f"not used: {rest}")


def test_a_file_of_torchvision_is_reported_with_its_prefix_and_classifier(tmp_path, capsys):
    _theirs("resnet18", tmp_path / "theirs", prefix="model.")
    initial_backbone(_config("resnet18", tmp_path / "theirs"))
    out = capsys.readouterr().out
    assert "(layout of torchvision and timm, prefix 'model.'): 100 tensors" in out
    assert out.endswith("not used: model.fc (2)\n")


@pytest.mark.slow
def test_exports_in_the_layouts_of_torchvision_and_timm_describe_themselves(tmp_path, capsys):
    config = small_config(name="vit_s16", stem=None, num_heads=12)
    config.crop.size = config.crop.eval_resize = 32
    config.dataset.update({"num_channels": 3, "mean": (0.5,) * 3, "std": (0.2,) * 3})
    save_run(tmp_path / "run", config)
    export(str(tmp_path / "run"), form="torchvision", output=str(tmp_path / "tv"), num_classes=5)
    export(str(tmp_path / "run"), form="timm", output=str(tmp_path / "timm"))
    for source, rest in (
        (tmp_path / "tv", "head (2)"),
        (tmp_path / "timm/model.safetensors", "no"),
    ):
        config.backbone.init_from = str(source)
        _same_tensors(initial_backbone(config), tmp_path / "run")
        assert f"not used: {rest}" in capsys.readouterr().out
    config.backbone.num_heads = None
    with pytest.raises(UserError, match=r"backbone\.num_heads: 12 there, 6 now"):
        initial_backbone(config)


@pytest.mark.parametrize("name", ["run", "b.safetensors"])
@pytest.mark.parametrize(
    ("group", "fields", "message"),
    [
        ("backbone", {"name": "tiny_resnet"}, "backbone.name: 'small_resnet' there, 'tiny_resnet'"),
        ("backbone", {"stem": "cifar"}, "backbone.stem: 'strided' there, 'cifar' now"),
        ("backbone", {"stem": None}, "backbone.stem: 'strided' there, 'imagenet' now"),
        ("dataset", {"num_channels": 3}, "dataset.num_channels: 1 there, 3 now"),
    ],
)
def test_other_backbones_are_rejected(name, group, fields, message, small):
    config = _small(small / name)
    config[group].update(fields)
    with pytest.raises(UserError, match=rf"^config\.backbone\.init_from: .*{message}"):
        initial_backbone(config)


def _without_mean(weights):
    del weights["layer3.1.bn2.running_mean"]


def _one_channel(weights):
    weights["conv1.weight"] = np.ascontiguousarray(weights["conv1.weight"][:, :1])


def _more(weights):
    weights["layer2.0.se.fc1.weight"] = np.zeros(8, np.float32)


@pytest.mark.parametrize(
    ("backbone", "change", "message"),
    [
        ({}, _without_mean, r"no layer3\.1\.bn2\.running_mean"),
        ({}, _one_channel, r"conv1\.weight has shape \(64, 1, 7, 7\), expected \(64, 3, 7, 7\)"),
        ({}, _more, r"the backbone has no layer2\.0\.se\.fc1\.weight"),
        ({}, dict.clear, "holds no backbone"),
        ({"name": "resnet50"}, None, "backbone.name: 'resnet18' there, 'resnet50' now"),
        ({"stem": "cifar"}, None, r"shape \(64, 3, 7, 7\), expected \(64, 3, 3, 3\)"),
    ],
)
def test_files_that_do_not_fit_are_rejected(backbone, change, message, tmp_path):
    _theirs("resnet18", tmp_path / "theirs")
    if change:
        weights = load_file(tmp_path / "theirs")
        change(weights)
        save_file(weights, tmp_path / "theirs")
    config = _config("resnet18", tmp_path / "theirs")
    config.backbone.update(backbone)
    with pytest.raises(UserError, match=rf"^config\.backbone\.init_from: .*{message}"):
        initial_backbone(config)


def test_heads_that_the_file_does_not_determine_must_be_given(tmp_path):
    config = _config("vit_s16", tmp_path / "theirs")
    _theirs("vit_s16", tmp_path / "theirs")
    with pytest.raises(UserError, match=r"does not specify the number of heads of its vit_s16"):
        initial_backbone(config)
    _theirs("vit_s16", tmp_path / "theirs", prefix="module.base_encoder.")
    with pytest.raises(UserError, match=r"backbone\.num_heads: 12 there, 6 now"):
        initial_backbone(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "cannot read"),
        (pathlib.Path.mkdir, "holds no run"),
        (lambda path: path.write_bytes(b"PK\x03\x04rest"), "is a torch pickle.* convert it"),
        (lambda path: path.write_bytes(b"\xff" * 64), "is not a valid safetensors file"),
    ],
)
def test_places_without_weights_are_rejected(make, message, tmp_path):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=rf"^config\.backbone\.init_from: .*{message}"):
        initial_backbone(_small(tmp_path / "source"))


def test_a_registered_backbone_starts_from_its_run_and_its_export(tmp_path, monkeypatch):
    spec = BACKBONES["tiny_resnet"]

    def make(*, channels, dtype, rngs, stem):
        return spec.make(channels=channels, dtype=dtype, rngs=rngs, stem=stem)

    monkeypatch.setitem(BACKBONES, "own", None)
    del BACKBONES["own"]
    music_jax.register_backbone("own", make)
    config = small_config(name="own", stem=None)
    config.backbone.options.stem = "cifar"
    save_run(tmp_path / "run", config)
    export(str(tmp_path / "run"), form="safetensors", output=str(tmp_path / "b.safetensors"))
    for name in ("run", "b.safetensors"):
        config.backbone.init_from = str(tmp_path / name)
        config.backbone.options.stem = "cifar"
        _same_tensors(initial_backbone(config), tmp_path / "run")
        config.backbone.options.stem = "strided"
        with pytest.raises(UserError, match=r"backbone\.options: .*'cifar'.* there, .*'strided'"):
            initial_backbone(config)


def test_no_other_command_reads_the_place_in_a_runs_config(small, tmp_path, monkeypatch):
    # Its weights do not fit the run, so that reading them in any way would fail.
    _theirs("resnet18", tmp_path / "theirs")
    save_run(tmp_path / "run", _small(tmp_path / "theirs"))
    monkeypatch.setattr(music_jax.registry, "initial_backbone", None)
    images = philox_images(3, 28, 1)
    features = music_jax.load(tmp_path / "run")(images)
    np.testing.assert_array_equal(features, music_jax.load(small / "run")(images))
    assert isinstance(load_run(str(tmp_path / "run"), images=False).network, Network)
    export(str(tmp_path / "run"), form="safetensors", output=str(tmp_path / "b"))
    assert "| backbone, initially | `theirs` |" in (tmp_path / "b.md").read_text()
