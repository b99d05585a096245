"""Images that features are extracted from; the cache of features, never read when damaged."""

import zipfile

import numpy as np
import pytest
from etils import epath
from pixel_runs import digits_source, pixel_config, pixel_run
from tfds_sets import IMAGES

from music_jax.config import set_views
from music_jax.evaluation.features import Expected, cached_arrays


@pytest.mark.parametrize("flips", [True, False])
def test_crops_are_flipped_if_the_training_flips_views(flips, tmp_path):
    config = pixel_config()
    set_views(config, flip_probability=0.5 if flips else 0.0)
    train, test = digits_source("train", range(64)), digits_source("test", range(3))
    run = pixel_run(tmp_path, train, test, config)
    batches = run.random_crop_batches(train, batch_size=64, num_epochs=2, description="")
    flipped = []
    for images, _ in batches:
        images = np.asarray(images)[..., 0]
        for image in images:
            same = np.any(np.all(image == IMAGES[:64], axis=(1, 2)))
            assert same or np.any(np.all(image[:, ::-1] == IMAGES[:64], axis=(1, 2)))
            flipped.append(not same)
    assert len(flipped) == 128
    # Of 128 fair coins fewer than 45 or more than 83 show heads once in 1,000 times.
    assert 45 <= sum(flipped) <= 83 if flips else not any(flipped)
    first, second = np.split(np.asarray(flipped), 2)
    assert flips == bool(np.any(first != second))  # drawn anew in each epoch


class _Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {
            "features": np.arange(12, dtype=np.float32).reshape(3, 4),
            "labels": np.asarray([1, -1, 0], np.int32),
        }


_EXPECTED = {
    "features": Expected((5, 4), np.float32),
    "labels": Expected((5,), np.int32, range(-1, 2)),
}


def _get(directory, compute, key="a"):
    directory = epath.Path(directory)
    return cached_arrays(directory, "test", {"step": key}, compute, expected=_EXPECTED)


def test_arrays_are_computed_once_per_key(tmp_path):
    compute = _Counting()
    for _ in range(2):
        found = _get(tmp_path, compute)
        np.testing.assert_array_equal(found["features"], np.arange(12.0).reshape(3, 4))
        assert found["labels"].dtype == np.int32
    assert compute.calls == 1
    _get(tmp_path, compute, "b")
    assert compute.calls == 2


@pytest.mark.parametrize("shape", [(5, 3), (5, 5), (5,), (5, 4, 1), ()])
def test_arrays_of_another_shape_or_type_are_not_accepted(shape):
    expected = _EXPECTED["features"]
    expected.check(np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"expected .*float32.* got float32"):
        expected.check(np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="got float64"):
        expected.check(np.zeros((3, 4)))


def _flip(path):
    content = bytearray(path.read_bytes())
    content[content.index(np.float32(11).tobytes())] ^= 1  # in the array "features"
    path.write_bytes(content)


def _header(old, new):
    """Changes the header of "features" and writes the checksum that the file then has."""

    def damage(path):
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        contents["features.npy"] = contents["features.npy"].replace(old, new, 1)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)

    return damage


def _change(name, change):
    def damage(path):
        arrays = dict(np.load(path))
        arrays[name] = change(arrays[name])
        np.savez(path, **arrays)

    return damage


def _without_labels(path):
    np.savez(path, features=np.load(path)["features"])


def _padded(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("more", bytes(1 << 17))


def _pickle(path):
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"features": np.asarray([{"a": 1}], object)})


@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 100_000),
        _pickle,
        _padded,
        _without_labels,
        _header(b"(", b")"),  # SyntaxError in NumPy
        _header(b"(3, 4)", b"(3, 99999999999)"),
        _change("features", lambda array: array[:2]),
        _change("features", lambda array: array[:, :3]),
        _change("features", lambda array: array[0, 0]),
        _change("features", lambda array: array.astype(np.float16)),
        _change("features", lambda array: np.tile(array, (2, 1))),
        _change("labels", lambda array: array + 1),
        _change("labels", lambda array: array - 1),
    ],
)
def test_damaged_files_are_computed_again_and_replaced(damage, tmp_path):
    compute = _Counting()
    _get(tmp_path, compute)
    damage(next(tmp_path.glob("*.npz")))
    for _ in range(2):
        np.testing.assert_array_equal(_get(tmp_path, compute)["features"].ravel(), np.arange(12.0))
    assert compute.calls == 2


def test_arrays_that_cannot_be_cached_are_returned_with_a_warning(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    found = _get(tmp_path / "file", _Counting())
    assert found["features"].shape == (3, 4)
    assert "not cached" in capsys.readouterr().out
