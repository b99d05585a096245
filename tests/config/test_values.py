"""Names and values of a config's fields."""

import pytest

from music_jax.config.values import normalize_path


@pytest.mark.parametrize("path", ["~/a/b/", "~//a/./b", "/home/me/a/c/../b", "/home/me/a/b"])
def test_all_spellings_of_a_folder_give_one_path(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert normalize_path(path) == "/home/me/a/b"


@pytest.mark.parametrize(
    "name", ["", "photos", "cifar10:train[:50%]", "gs://bucket//a/", "imagenet/c:1.0.0:test"]
)
def test_names_of_datasets_and_buckets_are_not_changed(name):
    assert normalize_path(name) == name
