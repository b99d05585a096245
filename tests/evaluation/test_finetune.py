"""Fine-tuning: its steps, its metrics, and lists of images by file name."""

import dataclasses

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from listed_records import list_source
from pixel_runs import digits_source, pixel_config, pixel_run
from small_runs import small_config

from music_jax.data.folder import open_folder
from music_jax.distributed.mesh import make_data_mesh
from music_jax.errors import UserError
from music_jax.evaluation import finetune as module
from music_jax.evaluation.features import SplitFeatures
from music_jax.evaluation.finetune import (
    Classifier,
    full_finetune,
    logit_extractor,
    rows_of_list,
    semi_supervised,
    train_classifier,
)
from music_jax.evaluation.run import Run
from music_jax.models.network import init_network, make_network


def _run(directory, params, *, num_classes, seed=0, devices=None, config=None, **fields):
    """A run whose images are divided by 255."""
    config = config or pixel_config()
    config.seed = seed
    config.dataset.update({"mean": (0.0,), "std": (1.0,)})
    source = digits_source("digits", range(2), num_classes=num_classes)
    run = pixel_run(directory, source, source, config)
    return dataclasses.replace(run, params=params, mesh=make_data_mesh(devices), **fields)


def test_logits_use_the_running_statistics(tmp_path):
    """They do not depend on the other images of a batch."""
    config = small_config(name="tiny_resnet")
    network = make_network(config)
    params, batch_stats = jax.jit(lambda key: init_network(config, key))(jax.random.key(0))
    batch_stats = jax.tree.map(lambda x: 0.7 * x + 0.2, batch_stats)
    rng = np.random.Generator(np.random.Philox(key=0))
    images = rng.integers(0, 256, (6, 28, 28, 1), dtype=np.uint8)
    kernel = rng.standard_normal((network.num_features, 3), np.float32)
    bias = np.asarray([0.5, -1.0, 2.0], np.float32)
    classifier = Classifier(params, (jnp.asarray(kernel), jnp.asarray(bias)))
    run = _run(tmp_path, params, num_classes=3, config=config, network=network)
    extract = logit_extractor(run, classifier, batch_stats)
    found = np.asarray(extract(images)["logits"])
    features = network.features(params, batch_stats, jnp.asarray(images, jnp.float32) / 255)
    np.testing.assert_allclose(found, np.asarray(features) @ kernel + bias, rtol=1e-4, atol=1e-4)
    brighter = images.copy()
    brighter[1:] = 255
    np.testing.assert_allclose(extract(brighter)["logits"][0], found[0], rtol=1e-4, atol=1e-4)


def test_steps_match_sgd_with_momentum_and_decay_in_plain_numpy(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 32, 8, 8, 1), np.uint8)  # three steps an epoch
    labels = rng.integers(3, size=(6, 32))
    scale = rng.uniform(0.5, 1.5, 64)
    run = _run(tmp_path, {"scale": jnp.asarray(scale, jnp.float32)}, num_classes=3, seed=4)
    batches = [(jnp.asarray(x), jnp.asarray(y)) for x, y in zip(images, labels, strict=True)]
    with jax.numpy_dtype_promotion("standard"):
        found, _ = train_classifier(
            run,
            batches,
            num_steps=6,
            learning_rates=(5.0, 1.0),
            momentum=0.8,
            weight_decay=0.05,
        )
    w = 0.01 * np.asarray(jax.random.normal(jax.random.key(4), (64, 3)), np.float64)
    b = np.zeros(3)
    m_scale, m_w, m_b = np.zeros(64), np.zeros((64, 3)), np.zeros(3)
    for step, (x, y) in enumerate(zip(images.reshape(6, 32, 64) / 255, labels, strict=True)):
        factor = 0.5 * (1 + np.cos(np.pi * step / 6))
        scores = np.exp(x * scale @ w + b)
        error = (scores / scores.sum(1, keepdims=True) - np.eye(3)[y]) / 32
        m_scale = 0.8 * m_scale + np.sum(error @ w.T * x, axis=0) + 0.05 * scale
        m_w = 0.8 * m_w + (x * scale).T @ error + 0.05 * w
        m_b = 0.8 * m_b + error.sum(0) + 0.05 * b
        scale = scale - 5.0 * factor * m_scale
        w, b = w - factor * m_w, b - factor * m_b
    np.testing.assert_allclose(found.backbone["scale"], scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.head[0], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.head[1], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("devices", "waits"), [(1, 0), (2, 3)])
def test_steps_are_blocked_on_only_if_devices_share_the_cores(
    devices, waits, tmp_path, monkeypatch
):
    counted = []
    monkeypatch.setattr(module.jax, "block_until_ready", counted.append)
    images, labels = jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4) % 2
    run = _run(tmp_path, {"scale": jnp.ones(64)}, num_classes=2, devices=devices)
    options = {"learning_rates": (0.1, 0.1), "momentum": 0.9, "weight_decay": 0.0}
    with jax.numpy_dtype_promotion("standard"):
        train_classifier(run, [(images, labels)] * 3, num_steps=3, **options)
    assert len(counted) == waits


def _labels(source):
    features = np.zeros((len(source), 1))
    return SplitFeatures({"features": features}, source.labels(), np.arange(len(source)))


def test_fine_tuning_uses_labeled_images_and_reports_top_1_and_top_5(tmp_path, monkeypatch):
    ranks = np.asarray([0, 1, 4, 5, 9, 0, 3, 4], np.int32)  # of the labels: logits fall with them
    logits = -np.tile(np.arange(10.0), (8, 1))
    tested = SplitFeatures({"logits": logits}, ranks, np.arange(8))
    monkeypatch.setattr(module, "train_classifier", lambda *_, **__: (None, None))
    monkeypatch.setattr(Run, "extract", lambda self, extractor, *_: extractor)
    monkeypatch.setattr(module, "logit_extractor", lambda *_: tested)
    monkeypatch.setattr(Run, "_split", lambda self, source, _: _labels(source))
    monkeypatch.setattr(module, "rows_of_list", lambda *_: np.asarray([5, 3, 1]))
    config = pixel_config()
    config.semi_supervised.lists = ("list.txt",)
    train = digits_source("train", range(40), unlabeled={3, 7})
    run = pixel_run(tmp_path, train, digits_source("test", range(100, 108)), config)
    expected = {"top1": 2 / 8, "top5": 6 / 8, "num_test": 8}
    whole = full_finetune(run)
    assert whole == expected | {"num_train": 38, "batch_size": 16}
    few = semi_supervised(run)["by_share"]
    assert few == {"20 %": expected | {"num_train": 2, "batch_size": 2, "list": "list.txt"}}


@pytest.fixture
def source(tmp_path):
    for wordnet in ("n01", "n02"):
        (tmp_path / "train" / wordnet).mkdir(parents=True)
        for i in range(4):
            path = tmp_path / "train" / wordnet / f"{wordnet}_{i}.JPEG"
            cv2.imwrite(str(path.with_suffix(".jpg")), np.zeros((4, 4, 3), np.uint8))
            path.with_suffix(".jpg").rename(path)
    return open_folder(str(tmp_path / "train"))


def _list(tmp_path, *lines):
    path = tmp_path / "list.txt"
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def test_listed_images_are_found_by_file_name(source, tmp_path):
    path = _list(tmp_path, "n02_1.JPEG", "n01_3.JPEG", "", "n02/n02_0.JPEG")
    rows = rows_of_list(source, path)
    assert [source.record_name(i) for i in rows] == [
        "n01/n01_3.JPEG",
        "n02/n02_0.JPEG",
        "n02/n02_1.JPEG",
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_may_have_windows_encodings_and_newlines(source, tmp_path, encoding, newline):
    text = newline.join(["n02_1.JPEG", "n01_3.JPEG"])
    (tmp_path / "list.txt").write_bytes(text.encode(encoding))
    rows = rows_of_list(source, str(tmp_path / "list.txt"))
    assert [source.record_name(i) for i in rows] == ["n01/n01_3.JPEG", "n02/n02_1.JPEG"]


def test_listed_tfds_records_are_found_by_their_file_name_feature(tmp_path):
    records = [{"file_name": f"n03_{i}.JPEG".encode(), "image": b"", "label": 0} for i in range(5)]
    source = list_source("tfds", records, 2)
    np.testing.assert_array_equal(
        rows_of_list(source, _list(tmp_path, "n03_4.JPEG", "n03_2.JPEG")), [2, 4]
    )


class _Damaged(list):
    def __getitem__(self, index):
        if index == 2:
            raise ValueError("array_record: corrupted chunk")
        return super().__getitem__(index)


def test_listed_images_of_damaged_records_are_excluded(tmp_path, capsys):
    records = _Damaged({"file_name": f"n03_{i}.JPEG", "image": b"", "label": 0} for i in range(5))
    source = list_source("tfds", records, 2)
    path = _list(tmp_path, "n03_4.JPEG", "n03_2.JPEG")
    np.testing.assert_array_equal(rows_of_list(source, path), [4])
    assert "1 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="2 of the 3 images"):
        rows_of_list(source, _list(tmp_path, "n03_4.JPEG", "n03_2.JPEG", "n09_1.JPEG"))


def test_a_wrong_list_is_an_error_that_names_a_missing_image(source, tmp_path):
    with pytest.raises(UserError, match=r"1 of the 2 images .* such as 'n09_1.JPEG'.*n01_0.JPEG"):
        rows_of_list(source, _list(tmp_path, "n09_1.JPEG", "n01_0.JPEG"))
    with pytest.raises(UserError, match="is empty"):
        rows_of_list(source, _list(tmp_path))
    with pytest.raises(UserError, match="cannot read the list"):
        rows_of_list(source, str(tmp_path / "nowhere.txt"))
