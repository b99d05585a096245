"""Every field of the config, each with a different value, reaches the function that uses it.

No field has its default and no two of a kind have the same value; images are not square, and
sample indices are not positions in the batch. Numbers that a step gives are computed a second time
here, from the fields' values as they are written below.
"""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx
from listed_records import list_source

from music_jax.config import default_config, get_field, validate
from music_jax.data import datasets, tfds_source
from music_jax.data.augment import ViewAugmentation, augment_views
from music_jax.data.crops import Crop
from music_jax.data.order import TrainingOrder
from music_jax.data.skipped import SkippedImages
from music_jax.distributed.mesh import batch_sharding, make_data_mesh
from music_jax.evaluation import feature_protocols, features, finetune, online
from music_jax.evaluation.run import Run
from music_jax.metrics.linear_probe import ProbeRecipe, ProbeResult
from music_jax.models.network import INIT_COMPILER_OPTIONS, init_network
from music_jax.objectives import music_terms
from music_jax.train import input as train_input
from music_jax.train import online_probe
from music_jax.train.input import TrainingInput
from music_jax.train.recipe import make_recipe
from music_jax.train.state import init_state
from music_jax.train.step import compile_step

_VIEW_1 = {
    "flip_probability": 0.31,
    "jitter_probability": 0.32,
    "brightness": 0.33,
    "contrast": 0.34,
    "saturation": 0.35,
    "hue": 0.36,
    "grayscale_probability": 0.37,
    "blur_probability": 0.38,
    "blur_sigma": (0.39, 1.4),
    "solarize_probability": 0.41,
    "affine_probability": 0.42,
    "rotation_degrees": 43.0,
    "translation": 0.044,
    "scale": (0.95, 1.06),
    "shear_degrees": 4.7,
    "noise_probability": 0.48,
    "noise_std": 0.049,
}
_VIEW_2 = _VIEW_1 | {
    name: value * 0.5 for name, value in _VIEW_1.items() if isinstance(value, float)
}
_LOCAL = _VIEW_1 | {
    name: value * 0.75 for name, value in _VIEW_1.items() if isinstance(value, float)
}

_VALUES = {
    "seed": 5,
    "batch_size": 8,
    "accumulation_steps": 2,
    "num_epochs": 4,
    "compute_dtype": "bfloat16",
    "deterministic": False,
    "log_every_steps": 7,
    "num_decode_threads": 3,
    "tensorboard": False,
    "wandb_project": "project",
    "objective": {
        "num_segments": 3,
        "units_per_segment": 4,
        "temperature": 0.7,
        "center": True,
        "diagonal_weight": 1.5,
        "cross_segment_weight": 0.6,
        "invariance_weight": 2.5,
        "off_diagonal_weight": 0.03,
        "similarity_weight": 11.0,
        "variance_weight": 13.0,
        "covariance_weight": 5.0,
        "contrast_temperature": 0.35,
        "sigreg_weight": 0.15,
        "num_slices": 24,
        "num_points": 9,
        "t_max": 3.5,
        "cosine_weight": 50.0,
        "epsilon_squared": 0.45,
        "sharpness_weight": 1.25,
        "diversity_weight": 1.75,
    },
    "dataset": {
        "name": "named",
        "path": "photos",
        "train_split": "trained",
        "test_split": "tested",
        "data_dir": "/data",
        "manual_dir": "/manual",
        "try_gcs": True,
        "max_skipped_share": 0.25,
        "image_key": "picture",
        "label_key": "kind",
        "num_channels": 1,
        "pixel_type": "uint16",
        "mean": (0.4,),
        "std": (0.3,),
    },
    "crop": {"size": 12, "scale": (0.2, 0.9), "aspect_ratio": (0.6, 1.7), "eval_resize": 15},
    "local_views": {"count": 2, "size": 6, "scale": (0.1, 0.4)},
    "augmentation": {"view_1": _VIEW_1, "view_2": _VIEW_2, "local": _LOCAL},
    "backbone": {
        "name": "tiny_resnet",
        "remat": True,
        "stem": "strided",
        "zero_init_residual": False,
        "num_heads": None,  # of vision transformers alone: tests/exchange/test_importing.py
        "init_from": "run",  # of a new training alone: tests/train/test_initial.py
        "frozen_stages": 1,
    },
    "projector": {"hidden_sizes": (10, 14), "output_size": 12},
    "optimizer": {
        "name": "sgd",
        "base_learning_rate": 6.4,
        "backbone_scale": 0.75,
        "weight_decay": 0.01,
        "momentum": 0.7,
        "warmup_epochs": 1,
        "min_warmup_steps": 2,
        "final_scale": 0.05,
    },
    "sharding": {"fsdp": 1},
    "guards": {
        "enabled": False,
        "policy": "rewind",
        "max_rewinds": 1,
        "warmup_steps": 2,
        "loss_spike_deviations": 5.5,
        "loss_spike_window": 6,
        "collapse_steps": 8,
        "min_usage_entropy": 0.21,
        "max_dead_units": 0.82,
        "min_embedding_std": 0.023,
        "min_effective_rank": 1.3,
        "check_replicas_every_steps": 11,
        "check_determinism_every_steps": 13,
    },
    "checkpoint": {
        "every_steps": 9,
        "max_to_keep": 4,
        "ignore_failed_saves": True,
        "grace_seconds": 17.0,
    },
    "evaluation": {
        "train": "one:first",
        "test": "two:second",
        "batch_size": 6,
        "view_images": 4,
        "num_views": 3,
    },
    "linear_eval": {
        "num_epochs": 21,
        "batch_size": 22,
        "base_learning_rates": (0.23, 0.24),
        "momentum": 0.25,
        "weight_decay": 0.26,
        "drop_epochs": (7, 8),
        "random_crops": False,
        "feature_scaling": "whiten",
        "validation_fraction": 0.29,
        "raw_pixels": True,
        "random_init": True,
    },
    "knn": {"enabled": False, "k": 3, "more_k": (1, 5), "temperature": 0.5},
    "few_shot": {"shots": (2, 4), "draws": 6},
    "semi_supervised": {
        "fractions": (0.5, 1.0),
        "lists": ("first.txt", ""),
        "backbone_learning_rates": (0.31, 0.32),
        "head_learning_rates": (0.33, 0.34),
        "num_epochs": 35,
        "batch_size": 36,
        "momentum": 0.37,
        "weight_decay": 0.38,
    },
    "finetune": {
        "backbone_learning_rate": 0.41,
        "head_learning_rate": 0.42,
        "num_epochs": 43,
        "batch_size": 44,
        "momentum": 0.45,
        "weight_decay": 0.46,
    },
    "online": {
        "every_steps": 3,  # of a training: tests/train/test_loop.py
        "measures": ("rankme", "lidar", "knn"),
        "num_images": 10,
        "view_images": 7,
        "num_views": 4,
    },
    "online_probe": {
        "enabled": True,
        "train": "three:third",
        "every_steps": 2,
        "batch_size": 5,
        "learning_rate": 0.51,
        "momentum": 0.52,
        "weight_decay": 0.53,
    },
}
# The one field that stays: the objectives are compared by name in test_recipe.py.
_AS_BY_DEFAULT = {"objective.name", "backbone.num_heads"}


@pytest.fixture
def config():
    config = default_config()
    config.update(_VALUES)
    validate(config)
    return config


def _leaves(part, prefix=""):
    for name, value in part.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def test_no_field_has_its_default_and_the_views_share_none(config):
    default = default_config()
    same = {
        field for field in _leaves(default) if get_field(default, field) == get_field(config, field)
    }
    assert same == _AS_BY_DEFAULT
    views = config.augmentation.values()
    same = {name for name in _VIEW_1 if len({view[name] for view in views}) < 3}
    assert same == {"blur_sigma", "scale"}


class _Calls:
    """Replaces functions and records their calls."""

    def __init__(self, monkeypatch):
        self.of, self._monkeypatch = {}, monkeypatch

    def replace(self, module, name, result=lambda *given, **options: None):
        def recorded(*given, **options):
            self.of.setdefault(name, []).append((given, options))
            return result(*given, **options)

        self._monkeypatch.setattr(module, name, recorded)

    def options(self, name):
        (((_, options)),) = self.of[name]
        return options


@pytest.fixture
def calls(monkeypatch):
    return _Calls(monkeypatch)


def _some(options, *names):
    return tuple(options[name] for name in names)


def test_the_recipe_has_every_field_that_a_step_needs(config):
    recipe = make_recipe(config, steps_per_epoch=3)
    assert recipe.views == (ViewAugmentation(**_VIEW_1), ViewAugmentation(**_VIEW_2))
    assert recipe.local_views == (ViewAugmentation(**_LOCAL),) * 2
    assert (recipe.mean, recipe.std, recipe.seed) == ((0.4,), (0.3,), 5)
    assert (recipe.dtype, recipe.accumulation_steps) == (jnp.bfloat16, 2)
    assert recipe.guards.to_dict() == _VALUES["guards"]
    assert recipe.statistics.keywords == {"num_segments": 3, "temperature": 0.7, "center": True}
    peak = 6.4 * 8 / 256  # of 3 steps of warm-up and 9 of a cosine
    for step, expected in [
        (0, 0),
        (1, peak / 3),
        (3, peak),
        (6, peak * (0.05 + 0.95 * (1 + math.cos(math.pi / 3)) / 2)),
        (12, 0.05 * peak),
    ]:
        np.testing.assert_allclose(recipe.schedule(step), expected, rtol=1e-5)


def test_the_network_is_the_one_that_is_described(config):
    recipe = make_recipe(config, steps_per_epoch=3)
    params, stats = jax.eval_shape(lambda: init_network(config, jax.random.key(0)))
    modules = nnx.merge(recipe.network.graph.definition, params, stats, {}, copy=True)
    backbone = modules.backbone
    assert (backbone.conv.kernel_size, backbone.conv.strides) == ((3, 3), 2)
    assert (backbone.conv.in_features, backbone.remat, backbone.dtype) == (1, True, jnp.bfloat16)
    head = modules.projector
    sizes = [(linear.in_features, linear.out_features) for linear in (*head.hidden, head.output)]
    assert sizes == [(recipe.network.num_features, 10), (10, 14), (14, 12)]
    assert head.dtype == jnp.bfloat16


def test_a_step_is_the_one_computed_by_hand(config):
    config.compute_dtype = "float32"  # so that the numbers can be compared
    config.backbone.remat, config.projector.hidden_sizes = False, ()
    for view in ("view_1", "view_2", "local"):  # which take long to compile
        for slow in ("affine", "jitter", "blur"):
            config.augmentation[view][f"{slow}_probability"] = 0.0
    first, second, others = (
        config.augmentation[view].to_dict() for view in ("view_1", "view_2", "local")
    )
    recipe, mesh = make_recipe(config, steps_per_epoch=3), make_data_mesh(1)
    state = init_state(config, recipe.optimizer, mesh)
    # The step takes over the state's buffers, so what is compared with is copied.
    start, stats = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
    for block in start["backbone"]["blocks"].values():
        np.testing.assert_array_equal(block["norm2"]["scale"], 1)  # zero_init_residual is False
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 2, 12, 18, 1), dtype=np.uint8)
    local = rng.integers(0, 256, (2, 8, 2, 6, 10, 1), dtype=np.uint8)
    indices = rng.permutation(10_000)[:16].reshape(2, 8).astype(np.uint32)
    key = jax.random.fold_in(jax.random.key(5), 1)

    @functools.partial(jax.jit, compiler_options=INIT_COMPILER_OPTIONS)
    def loss_and_gradient(params, images, local, indices):
        augment = functools.partial(
            augment_views, sample_indices=indices, key=key, mean=(0.4,), std=(0.3,)
        )
        groups = (
            augment(images, views=(ViewAugmentation(**first), ViewAugmentation(**second))),
            augment(local, views=(ViewAugmentation(**others),) * 2, first_view=2),
        )

        def loss(params):
            parts = [  # two microbatches, of the even and of the odd places
                jnp.concatenate(
                    [recipe.network.embed(params, stats, views[i::2])[1] for views in groups], 1
                )
                for i in (0, 1)
            ]
            embeddings = jnp.stack(parts, axis=1).reshape(8, 4, 12)
            z = jnp.moveaxis(embeddings - jnp.mean(embeddings, axis=0, keepdims=True), 1, 0)
            total = 0.0
            for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3)):
                terms = music_terms(z[a], z[b], num_segments=3, temperature=0.7)
                total += 1.5 * terms.diagonal + 0.6 * terms.cross_segment + 2.5 * terms.invariance
            return total / 5

        return jax.value_and_grad(loss)(params)

    step_function = compile_step(recipe, state, mesh)
    gradients = []
    for step in range(2):  # the first at a rate of 0, where the warm-up begins
        loss, gradient = loss_and_gradient(start, images[step], local[step], indices[step])
        gradients.append(gradient)
        batch = ((images[step], local[step]), indices[step])
        batch = jax.device_put(batch, batch_sharding(mesh))
        state, metrics = step_function(state, *batch)
        norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-3)
        np.testing.assert_allclose(metrics["learning_rate"], step * 0.2 / 3, rtol=1e-5)
    for path, scale in (
        (("projector", "output", "kernel"), 1.0),
        (("backbone", "blocks", 0, "conv1", "kernel"), 0.75),
        (("backbone", "conv", "kernel"), 0.0),  # the frozen first stage
    ):
        before, after, first, second = (
            np.asarray(_at(tree, path), np.float64) for tree in (start, state.params, *gradients)
        )
        velocity = 0.7 * (first + 0.01 * before) + second + 0.01 * before
        moved = after - before
        np.testing.assert_allclose(
            moved, -0.2 / 3 * scale * velocity, rtol=1e-2, atol=1e-3 * np.abs(moved).max()
        )


def _at(tree, path):
    for name in path:
        tree = tree[name]
    return tree


def _source(count=12):
    records = [{"picture": b"", "kind": i % 4} for i in range(count)]
    return list_source(
        f"{count} photos", records, 4, tuple("abcd"), image_key="picture", label_key="kind"
    )


_CROP = Crop(12, (0.2, 0.9), (0.6, 1.7))


def test_images_are_cropped_as_described(config, calls):
    for module in (train_input, features):
        calls.replace(module, "training_batches", lambda *given, **options: iter(()))
    calls.replace(features, "evaluation_batches", lambda *given, **options: iter(()))
    source, mesh, skipped = _source(), make_data_mesh(1), object()
    order = TrainingOrder(12, config.batch_size, config.seed)
    list(TrainingInput(config, source, order, mesh, skipped).on_host(2, 4, local_views=True))
    frozen = features.FrozenNetwork(config, None, {}, {}, mesh, skipped)
    list(frozen.random_crop_batches(source, batch_size=5, num_epochs=3, description=""))
    recipe = types.SimpleNamespace(network=types.SimpleNamespace(num_features=6))
    probe = online_probe.OnlineProbe(config, source, recipe, mesh, skipped)
    probe.start(4, 11, types.SimpleNamespace(has=lambda step, name: False))
    training, crops, probed = calls.of["training_batches"]
    for given, options in (training, crops, probed):
        assert given[0] is source
        names = ("channels", "dtype", "skipped", "num_threads")
        assert _some(options, *names) == (1, "uint16", skipped, 3)
    assert training[0][1] == TrainingOrder(12, 8, 5)
    assert _some(training[1], "start_step", "num_steps") == (2, 4)
    assert training[1]["views"] == {
        "images": (_CROP, 2),
        "local_images": (Crop(6, (0.1, 0.4), (0.6, 1.7)), 2),
    }
    assert crops[1]["views"] == probed[1]["views"] == {"images": (_CROP, 1)}
    assert crops[0][1] == TrainingOrder(12, 5, 5)
    assert _some(crops[1], "flip", "num_steps") == (True, 6)
    assert probed[0][1] == TrainingOrder(12, 5, 5)
    assert _some(probed[1], "start_step", "num_steps") == (2, 5)  # of every second
    with pytest.raises(IndexError):  # without batches there is nothing to join
        frozen.extract(None, source, "")
    options = calls.options("evaluation_batches")
    names = ("size", "resize_shorter_side", "channels", "dtype", "batch_size", "num_threads")
    assert _some(options, *names) == (12, 15, 1, "uint16", 6, 3)


def test_images_come_from_the_location_in_the_config(config, calls):
    calls.replace(tfds_source, "prepare")
    calls.replace(tfds_source, "open_split", lambda dataset, split: _source())
    calls.replace(datasets, "open_path", lambda path: _source())
    calls.replace(online_probe, "OnlineProbe")
    training = datasets.training_source(config)
    assert calls.of.pop("open_path") == [(("photos",), {})]
    datasets.evaluation_sources(config, training)
    online_probe.make_online_probe(config, None, None, None, None)
    config.dataset.path = ""
    datasets.training_source(config)
    config.evaluation.update({"train": "", "test": ""})
    datasets.evaluation_sources(config, training)
    opened = [given for given, _ in calls.of["open_split"]]
    assert {(dataset.name, split) for dataset, split in opened} == {
        ("one", "first"),
        ("two", "second"),
        ("three", "third"),
        ("named", "trained"),
        ("named", "tested"),
    }
    for dataset, _ in opened:
        assert _some(dataset, "data_dir", "manual_dir") == ("/data", "/manual")
        assert _some(dataset, "image_key", "label_key") == ("picture", "kind")
        assert dataset.try_gcs


def test_the_online_probe_learns_as_described(config, calls):
    calls.replace(online_probe, "_probe_step", lambda probe, *given, **options: probe)
    network = types.SimpleNamespace(
        num_features=6, features=lambda params, stats, images: jnp.zeros((len(images), 6))
    )
    recipe = dataclasses.replace(make_recipe(config, steps_per_epoch=3), network=network)
    probe = online_probe.OnlineProbe(config, _source(), recipe, make_data_mesh(1), None)
    images = jnp.zeros((5, 12, 12, 1), jnp.uint8)
    state = online_probe._init_probe(6, 4, config.online_probe)
    probe._step(state, {}, {}, images, jnp.zeros(5, jnp.int32))
    (((*_, settings), _),) = calls.of["_probe_step"]
    assert _some(settings, "learning_rate", "momentum", "weight_decay") == (0.51, 0.52, 0.53)


class _FakeFeatures(Run):
    """A run whose features are all 1, those of a random backbone 2, and pixels 3."""

    def _split(self, source, model):
        value = {"trained": 1.0, "random_init": 2.0, "raw_pixels": 3.0}[model]
        labels = source.labels()
        rows = np.full((len(source), 5), value, np.float32)
        return features.SplitFeatures({"features": rows}, labels, np.arange(len(source)))

    def probabilities(self):
        return np.full((len(self.images), 3, 4), 0.25, np.float32)


@pytest.fixture
def run(config, tmp_path):
    train, test = _source(12), _source(8)
    return _FakeFeatures(
        config=config,
        workdir=epath.Path(tmp_path),
        sources=datasets.EvaluationSources(train, test),
        images=test,
        network=None,
        params={},
        batch_stats={},
        step=3,
        mesh=make_data_mesh(1),
        skipped=SkippedImages(epath.Path(tmp_path), max_share=0.5),
    )


def test_the_linear_probe_is_trained_as_described_on_the_named_features(run, calls):
    def result(train, *given, **options):
        score = float(train[0, 0]) / 10
        return ProbeResult(score, score + 0.05, 0.24, 12, np.zeros(8, np.int32))

    calls.replace(feature_protocols.linear_probe, "linear_probe", result)
    found = feature_protocols.linear(run)
    assert found == {
        "top1": 0.1,
        "top5": pytest.approx(0.15),
        "num_train": 12,
        "num_test": 8,
        "num_classes": 4,
        "learning_rate": pytest.approx(0.24 * 12 / 256),  # all images at once
        "raw_pixels_top1": 0.3,
        "random_init_top1": 0.2,
    }
    assert len(calls.of["linear_probe"]) == 3
    for given, options in calls.of["linear_probe"]:
        assert given[4] == ProbeRecipe(
            num_epochs=21,
            batch_size=22,
            base_learning_rates=(0.23, 0.24),
            momentum=0.25,
            weight_decay=0.26,
            drop_epochs=(7, 8),
        )
        names = ("num_classes", "feature_scaling", "validation_fraction", "seed")
        assert _some(options, *names) == (4, "whiten", 0.29, 5)
        assert (len(given[0]), len(given[2])) == (12, 8)


def test_neighbors_and_few_shots_are_counted_as_described(run, calls):
    def predict(train, labels, test, *, k, **options):
        return np.tile(np.asarray(k)[:, None] % 4, len(test))

    calls.replace(feature_protocols, "knn_predict", predict)
    found = feature_protocols.knn(run)
    assert (found["k"], found["temperature"], list(found["top1_by_k"])) == (3, 0.5, ["1", "3", "5"])
    assert {options["temperature"] for _, options in calls.of["knn_predict"]} == {0.5}

    def shots(*given, **options):
        return np.full(options["draws"], 0.5)

    calls.replace(feature_protocols, "few_shot", shots)
    feature_protocols.fewshot(run)
    names = ("shots", "draws", "seed")
    found = [_some(options, *names) for _, options in calls.of["few_shot"]]
    assert found == [(2, 6, 5), (4, 6, 5)]


def test_the_online_measures_are_as_described(config, calls):
    rows = np.ones((10, 5), np.float32)
    split = features.SplitFeatures({"features": rows}, np.arange(10) % 4, np.arange(10))
    calls.replace(features.FrozenNetwork, "extractor")
    calls.replace(features.FrozenNetwork, "extract", lambda *given, **options: split)
    calls.replace(
        features.FrozenNetwork,
        "extract_views",
        lambda *given, **options: {"features": np.ones((7, 4, 5))},
    )
    calls.replace(online, "knn_predict", lambda *given, **options: np.zeros(2, int))
    found = online.OnlineEvaluation(config, _source(), None, make_data_mesh(1), None)({}, {})
    assert set(found) == {"online_knn", "online_rankme", "online_seconds"}  # no images differ
    ((given, options),) = calls.of["knn_predict"]
    assert [len(x) for x in given] == [8, 8, 2]
    assert _some(options, "num_classes", "k", "temperature") == (4, 3, 0.5)
    (((_, _, source, _), _),) = calls.of["extract"]
    assert len(source) == 10
    (((_, source), options),) = calls.of["extract_views"]
    assert (len(source), *_some(options, "num_images", "num_views")) == (7, 7, 4)


def test_galleries_and_clusters_are_as_described(run, calls, monkeypatch):
    monkeypatch.setattr(feature_protocols, "_MAX_GALLERY", 9)
    calls.replace(feature_protocols, "average_precisions", lambda *given: np.ones(8))
    assert feature_protocols.retrieval(run)["num_gallery"] == 9
    ((gallery, *_), _), *_ = calls.of["average_precisions"]
    assert len(gallery) == 9
    calls.replace(feature_protocols, "joint_clusters", lambda p, **options: np.zeros(len(p), int))
    feature_protocols.clustering(run)
    assert _some(calls.options("joint_clusters"), "num_clusters", "seed") == (4, 5)


def test_fine_tuning_is_as_described(run, calls):
    logits = features.SplitFeatures(
        {"logits": np.eye(4)[[0, 1, 2, 0]]}, np.arange(4, dtype=np.int32), np.arange(4)
    )
    calls.replace(Run, "random_crop_batches")
    calls.replace(Run, "extract", lambda *given: logits)
    calls.replace(finetune, "train_classifier", lambda *given, **options: (None, None))
    calls.replace(finetune, "logit_extractor")
    calls.replace(finetune, "rows_of_list", lambda source, name: np.arange(10))
    run = dataclasses.replace(run, sources=datasets.EvaluationSources(_source(60), _source(4)))
    found = finetune.full_finetune(run)
    assert (found["top1"], found["num_train"], found["batch_size"]) == (0.75, 60, 44)
    finetune.semi_supervised(run)
    names = ("num_steps", "learning_rates", "momentum", "weight_decay")
    expected = [  # epochs times batches, rates of the backbone and the head for a batch of 256
        (43 * 1, [0.41 * 44 / 256, 0.42 * 44 / 256], 0.45, 0.46),
        (35 * 1, [0.31 * 10 / 256, 0.33 * 10 / 256], 0.37, 0.38),
        (35 * 1, [0.32 * 36 / 256, 0.34 * 36 / 256], 0.37, 0.38),
    ]
    assert [_some(options, *names) for _, options in calls.of["train_classifier"]] == expected
    assert [given[1] for given, _ in calls.of["rows_of_list"]] == ["first.txt"]
    cut = calls.of["random_crop_batches"]
    sizes = [
        (len(given[1]), options["batch_size"], options["num_epochs"]) for given, options in cut
    ]
    assert sizes == [(60, 44, 43), (10, 10, 35), (60, 36, 35)]
