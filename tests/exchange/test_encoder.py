"""`music_jax.load` and `python -m music_jax.encode`."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from philox_weights import philox_images
from small_runs import save_run, small_config

import music_jax
from music_jax.data.augment import normalize_images
from music_jax.data.folder import open_folder
from music_jax.errors import UnusableDataError, UserError
from music_jax.exchange import folder_encoding
from music_jax.exchange.encoder import Encoder
from music_jax.exchange.folder_encoding import encode_folder
from music_jax.exchange.trained import read_trained
from music_jax.models.network import make_network
from music_jax.objectives import segment_codes, segment_probabilities


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    state = save_run(directory, small_config())
    return directory, state


@pytest.fixture(scope="module")
def encoder(workdir):
    return music_jax.load(workdir[0])


@pytest.fixture
def folder(tmp_path):
    """Seven images below `photos`, and two files that are none."""
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    images = philox_images(7, 28, 1)
    for i, image in enumerate(images):
        cv2.imwrite(str(photos / (f"inner/{i}.png" if i % 2 else f"{i}.png")), image)
    (photos / "3-broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (photos / "inner" / "empty.png").write_bytes(b"")
    names = [f"{i}.png" for i in (0, 2, 4, 6)] + [f"inner/{i}.png" for i in (1, 3, 5)]
    return photos, names, images[[0, 2, 4, 6, 1, 3, 5]]


def test_features_and_codes_are_the_networks(workdir, encoder):
    state = workdir[1]
    config = small_config()
    images = philox_images(9, 28, 1)
    inputs = normalize_images(images, mean=(0.13,), std=(0.31,))
    features, embeddings = make_network(config).infer(state.params, state.batch_stats, inputs)
    np.testing.assert_allclose(encoder(images), features, rtol=1e-5, atol=1e-5)
    codes = encoder.codes(images)
    np.testing.assert_array_equal(codes, segment_codes(embeddings, num_segments=6))
    assert len(np.unique(codes)) > 1
    probabilities = encoder.probabilities(images)
    expected = segment_probabilities(embeddings, num_segments=6)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(axis=2), codes)
    assert encoder.probabilities([]).shape == (0, 6, 5)


def test_batches_and_sequences_make_no_difference(workdir, encoder):
    images = philox_images(11, 28, 1)
    expected = encoder(images)
    small = Encoder(read_trained(str(workdir[0])), batch_size=4)
    np.testing.assert_allclose(small(list(images[..., 0])), expected, rtol=1e-5, atol=1e-5)
    assert encoder([]).shape == (0, encoder.num_features)


def test_images_of_any_size_and_files_are_cut_alike(encoder, tmp_path):
    large = philox_images(1, 56, 1)[0][:, :50]
    cv2.imwrite(str(tmp_path / "large.png"), large)
    from_array, from_file = encoder([large, tmp_path / "large.png"])
    np.testing.assert_allclose(from_array, from_file, rtol=1e-6)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 28, 28, 1), np.float32), ValueError, "uint8"),
        (np.zeros((28, 28, 1), np.uint8), ValueError, "got an array of shape"),
        ([np.zeros((28, 28, 3), np.uint8)], ValueError, r"\[height, width, 1\]"),
        ([np.zeros((0, 28), np.uint8)], ValueError, "got an array of shape"),
        ("photo.jpg", ValueError, "images are a list"),
        (["nowhere.jpg"], UserError, "nowhere.jpg.*No such file"),
        ([__file__], UserError, "it is no JPEG"),
    ],
)
def test_wrong_images_are_told(images, error, message, encoder):
    with pytest.raises(error, match=message):
        encoder(images)


def _npy(output):
    record = json.loads(output.with_name(output.name + ".json").read_text())
    return record, np.load(output), np.load(output.with_suffix(".codes.npy"))


def test_a_folder_becomes_npy(encoder, folder, tmp_path):
    photos, names, images = folder
    output = tmp_path / "out" / "f.npy"
    said = encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    record, features, codes = _npy(output)
    assert record["files"] == names
    assert {b["file"] for b in record["broken"]} == {"3-broken.jpg", "inner/empty.png"}
    assert "2 cannot be read" in said
    np.testing.assert_allclose(features, encoder(images), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(codes, encoder.codes(images))
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "f.codes.npy",
        "f.npy",
        "f.npy.json",
    ]
    again = encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    assert again.endswith("is done")
    with pytest.raises(UserError, match="from other images or weights"):
        encode_folder(encoder, open_folder(str(photos)), str(output))


def test_a_folder_becomes_parquet(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_encoding, "PART_SIZE", 4)
    photos, names, images = folder
    output = tmp_path / "f.parquet"
    encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    table = pq.read_table(output)
    assert table["file"].to_pylist() == names
    found = np.asarray(table["features"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, encoder(images), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(table["codes"].to_pylist(), encoder.codes(images))


def test_it_goes_on_from_the_parts_that_are_whole(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_encoding, "PART_SIZE", 2)
    photos, names, images = folder
    source, output = open_folder(str(photos)), tmp_path / "f.npy"
    encoded = []

    def until(limit):
        def view_of(content):
            encoded.append(content)
            if len(encoded) > limit:
                raise KeyboardInterrupt
            return Encoder.view_of(encoder, content)

        return view_of

    monkeypatch.setattr(encoder, "view_of", until(5))
    with pytest.raises(KeyboardInterrupt):
        encode_folder(encoder, source, str(output), codes=True)
    parts = tmp_path / "f.npy.parts"
    assert sorted(p.name for p in parts.glob("*.npz")) == ["00000000.npz", "00000001.npz"]
    assert not output.exists()
    (parts / "00000001.npz").write_bytes((parts / "00000001.npz").read_bytes()[:100])

    encoded.clear()
    monkeypatch.setattr(encoder, "view_of", until(100))
    encode_folder(encoder, source, str(output), codes=True)
    assert len(encoded) == 7  # all but the first part's two
    record, features, _ = _npy(output)
    assert record["files"] == names
    monkeypatch.undo()
    np.testing.assert_allclose(features, encoder(images), rtol=1e-5, atol=1e-5)


def test_parts_of_other_images_are_not_gone_on_from(encoder, folder, tmp_path, capsys):
    photos, names, _ = folder
    output = tmp_path / "f.npy"
    parts = tmp_path / "f.npy.parts"
    parts.mkdir()
    (parts / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is in the way"):
        encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    (parts / "parts.json").write_text('{"fingerprint": "another"}')
    encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    assert "starting anew" in capsys.readouterr().out
    assert _npy(output)[0]["files"] == names


def test_what_was_encoded_of_other_pixels_is_not_done(encoder, folder, tmp_path):
    photos, _, images = folder
    output = tmp_path / "f.npy"
    encode_folder(encoder, open_folder(str(photos)), str(output))
    assert encode_folder(encoder, open_folder(f"{photos}/"), str(output)).endswith("is done")
    before = os.stat(photos / "0.png")
    cv2.imwrite(str(photos / "0.png"), 255 - images[0])
    assert os.stat(photos / "0.png").st_mtime_ns != before.st_mtime_ns
    with pytest.raises(UserError, match="from other images or weights"):
        encode_folder(encoder, open_folder(str(photos)), str(output))


def test_names_that_are_not_utf8_are_written_printable(encoder, folder, tmp_path):
    photos, names, _ = folder
    (photos / "6.png").rename(os.fsdecode(os.fsencode(photos) + b"/caf\xe9.png"))
    (photos / "3-broken.jpg").rename(os.fsdecode(os.fsencode(photos) + b"/br\xe9.jpg"))
    names = [*names[:3], "caf\\xe9.png", *names[4:]]
    encode_folder(encoder, open_folder(str(photos)), str(tmp_path / "f.npy"), codes=True)
    record = _npy(tmp_path / "f.npy")[0]
    assert record["files"] == names
    assert {b["file"] for b in record["broken"]} == {"br\\xe9.jpg", "inner/empty.png"}
    encode_folder(encoder, open_folder(str(photos)), str(tmp_path / "f.parquet"))
    assert pq.read_table(tmp_path / "f.parquet")["file"].to_pylist() == names


def test_a_folder_without_a_whole_image_is_told(encoder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no")
    source = open_folder(str(tmp_path / "photos"))
    with pytest.raises(
        UnusableDataError, match=r"none of the 1 images can be read, such as a\.png"
    ):
        encode_folder(encoder, source, str(tmp_path / "f.npy"))
    with pytest.raises(UserError, match=r"must end with \.npy or \.parquet"):
        encode_folder(encoder, source, str(tmp_path / "f.csv"))


def test_the_package_that_parquet_needs_is_looked_for_first(encoder, folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"this needs pyarrow.*music_jax\[export\]"):
        encode_folder(encoder, open_folder(str(folder[0])), str(tmp_path / "f.parquet"))
    assert not (tmp_path / "f.parquet.parts").exists()


def _command(*arguments):
    return [sys.executable, "-m", "music_jax.encode", *arguments]


@pytest.mark.slow
def test_the_command_is_stopped_and_goes_on(workdir, tmp_path):
    (tmp_path / "photos").mkdir()
    content = cv2.imencode(".png", philox_images(1, 28, 1)[0])[1].tobytes()
    for i in range(30_000):
        (tmp_path / "photos" / f"{i:05d}.png").write_bytes(content)
    output = tmp_path / "f.npy"
    command = _command(
        f"--workdir={workdir[0]}", f"--images={tmp_path / 'photos'}", f"--output={output}"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("f.npy.parts/*.npz")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "f.npy holds 1024 features of 30,000 images" in done.stdout
    features = np.load(output)
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("encode", [], "--workdir is missing"),
        ("encode", ["--workdir=x", "--images=y", "--output=z.npy"], "there is no folder 'y'"),
        ("export", ["--workdir=x", "--format=onnx", "--output=z"], "neither a workdir nor a file"),
        ("import_weights", ["--weights=x", "--workdir=y"], "cannot read"),
    ],
)
def test_commands_end_with_2_and_one_line(module, arguments, message, tmp_path):
    command = [sys.executable, "-m", f"music_jax.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
