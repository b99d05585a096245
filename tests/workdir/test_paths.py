"""Names of files and folders: as they are compared, and as they are written."""

import os

import pytest

from music_jax.errors import UserError
from music_jax.workdir.paths import check_utf8, escape_surrogates, normalized


@pytest.mark.parametrize("path", ["~/a/b/", "~//a/./b", "/home/me/a/c/../b", "/home/me/a/b"])
def test_spellings_of_one_folder_have_one_name(path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert normalized(path) == "/home/me/a/b"


@pytest.mark.parametrize(
    "name", ["", "photos", "cifar10:train[:50%]", "gs://bucket//a/", "imagenet/c:1.0.0:test"]
)
def test_other_names_stay_as_they_are(name):
    assert normalized(name) == name


def test_bytes_that_are_not_utf8_are_printable():
    assert (
        escape_surrogates(os.fsdecode("Straße ".encode() + b"caf\xe9\xff"))
        == "Straße caf\\xe9\\xff"
    )
    assert escape_surrogates("\ud800") == "\\ud800"


def test_a_path_that_is_not_utf8_is_refused_where_a_library_cannot_open_it():
    check_utf8("/home/é")
    with pytest.raises(UserError, match=r"/home/\\xe9 is not UTF-8.*rename it"):
        check_utf8(os.fsdecode(b"/home/\xe9"))
