"""Statistics of the channels, computed and cached."""

import dataclasses
import json
import logging

import numpy as np
import pytest
from channel_sets import npy, write_bands, write_depth
from etils import epath
from listed_records import list_source

from music_jax.config import default_config
from music_jax.data.datasets import open_path
from music_jax.data.statistics import compute_and_cache, compute_statistics, with_statistics
from music_jax.errors import UnusableDataError
from music_jax.workdir.run_config import write_config


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _config(folder, channels, pixel_type):
    config = default_config()
    config.dataset.update(
        path=str(folder), num_channels=channels, pixel_type=pixel_type, mean=(), std=()
    )
    return config


@pytest.mark.parametrize(
    ("write", "channels", "dtype", "rtol"),
    [(write_bands, 13, "float32", 1e-5), (write_depth, 1, "uint16", 1e-5)],
)
def test_they_are_those_of_numpy(write, channels, dtype, rtol, tmp_path):
    images = np.stack(write(tmp_path / "images", 14)).astype(np.float64)
    found = compute_statistics(open_path(str(tmp_path / "images")), channels=channels, dtype=dtype)
    values = images.reshape(-1, channels)
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=rtol)
    np.testing.assert_allclose(found.std, values.std(axis=0), rtol=rtol)
    assert found.num_images == 14


def test_bytes_are_in_units_of_255_and_every_pixel_counts_the_same():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (5 + i, 7, 3), dtype=np.uint8) for i in range(6)]
    found = compute_statistics(list_source("bytes", [{"image": x} for x in images]), channels=3)
    values = np.concatenate([x.reshape(-1, 3) for x in images]) / 255
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.std, values.std(axis=0), rtol=1e-5)


def test_a_large_image_with_a_mean_far_from_zero_loses_no_precision():
    image = np.random.default_rng(0).normal(1e5, 0.5, (1100, 1000, 2)).astype(np.float32)
    source = list_source("large", [{"image": image}])
    found = compute_statistics(source, channels=2, dtype=np.float32)
    np.testing.assert_allclose(found.std, image.astype(np.float64).std(axis=(0, 1)), rtol=1e-5)


def test_a_channel_with_one_value_has_a_deviation_of_one():
    image = np.full((8, 8, 2), 0.1, np.float32)
    image[..., 1] = np.arange(64).reshape(8, 8)
    found = compute_statistics(list_source("one", [{"image": image}]), channels=2, dtype=np.float32)
    assert found.mean[0] == pytest.approx(0.1)
    assert found.std[0] == 1.0
    assert found.std[1] == pytest.approx(image[..., 1].std(), rel=1e-5)


def test_some_images_are_evenly_spaced_and_broken_ones_are_left_out(caplog):
    records = [{"image": np.full((4, 4), i, np.uint8)} for i in range(101)]
    records[50] = {"image": b"broken"}
    with caplog.at_level(logging.WARNING):
        found = compute_statistics(list_source("few", records), channels=1, count=5)
    assert found.num_images == 4
    assert found.mean == (pytest.approx((0 + 25 + 75 + 100) / 4 / 255, rel=1e-5),)
    assert "1 of 5 images of few cannot be decoded" in caplog.text
    with pytest.raises(UnusableDataError, match="image 0: it is no JPEG"):
        compute_statistics(list_source("none", [{"image": b"broken"}]), channels=1)


def test_a_training_takes_them_from_the_cache_until_an_image_changes(tmp_path):
    write_bands(tmp_path / "images", 6)
    config = _config(tmp_path / "images", 13, "float32")
    source, nowhere = open_path(config.dataset.path), epath.Path(tmp_path / "run")
    found = with_statistics(config, source, nowhere)
    expected = compute_statistics(source, channels=13, dtype=np.float32)
    assert (found.dataset.mean, found.dataset.std) == expected[:2]
    assert config.dataset.mean == ()

    (path,) = (tmp_path / "cache").rglob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": [7.0] * 13}))
    assert with_statistics(config, source, nowhere).dataset.mean == (7.0,) * 13
    path.write_text(json.dumps(json.loads(path.read_text()) | {"std": [0.0] * 13}))
    assert with_statistics(config, source, nowhere).dataset.mean == expected.mean
    (tmp_path / "images" / "class0" / "000.tif").write_bytes(npy(np.zeros((9, 9, 13))))
    changed = with_statistics(config, open_path(config.dataset.path), nowhere)
    assert changed.dataset.mean != expected.mean


def test_those_of_images_that_change_while_they_are_read_are_not_used_again(tmp_path):
    write_bands(tmp_path / "images", 6)
    config = _config(tmp_path / "images", 13, "float32")
    source, nowhere = open_path(config.dataset.path), epath.Path(tmp_path / "run")

    def read(index, read=source.read):
        record = read(index)
        if index == 0:
            (tmp_path / "images" / "class0" / "000.tif").write_bytes(npy(np.zeros((9, 9, 13))))
        return record

    fingerprint = source.fingerprint(times=True)
    compute_and_cache(dataclasses.replace(source, read=read), fingerprint, config)
    changed = with_statistics(config, open_path(config.dataset.path), nowhere)
    expected = compute_statistics(open_path(config.dataset.path), channels=13, dtype=np.float32)
    assert changed.dataset.mean == expected.mean


def test_a_run_keeps_those_that_it_began_with(tmp_path):
    config = _config(tmp_path, 2, "float32")
    config.dataset.mean, config.dataset.std = (1.5, 2.5), (3.0, 4.0)
    write_config(epath.Path(tmp_path), config)
    empty = _config(tmp_path, 2, "float32")
    found = with_statistics(empty, list_source("no images", ()), epath.Path(tmp_path))
    assert (found.dataset.mean, found.dataset.std) == ((1.5, 2.5), (3.0, 4.0))
    assert with_statistics(config, list_source("no images", ()), epath.Path(tmp_path)) is config
