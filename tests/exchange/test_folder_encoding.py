"""Features of a folder of images, by `encode_folder` and `python -m music_jax.encode`."""

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
from music_jax.data.folder import open_folder
from music_jax.distributed.shares import Share
from music_jax.errors import UnusableDataError, UserError
from music_jax.exchange import folder_encoding
from music_jax.exchange.encoder import Encoder
from music_jax.exchange.folder_encoding import encode_folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    save_run(directory, small_config())
    return directory


@pytest.fixture(scope="module")
def encoder(workdir):
    return music_jax.load(workdir)


@pytest.fixture
def folder(tmp_path):
    """Seven images below `photos`, and two files that are not images."""
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    images = philox_images(7, 28, 1)
    for i, image in enumerate(images):
        cv2.imwrite(str(photos / (f"inner/{i}.png" if i % 2 else f"{i}.png")), image)
    (photos / "3-broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    (photos / "inner" / "empty.png").write_bytes(b"")
    names = [f"{i}.png" for i in (0, 2, 4, 6)] + [f"inner/{i}.png" for i in (1, 3, 5)]
    return photos, names, images[[0, 2, 4, 6, 1, 3, 5]]


def _npy(output):
    record = json.loads(output.with_name(output.name + ".json").read_text())
    return record, np.load(output), np.load(output.with_suffix(".codes.npy"))


def test_a_folder_is_encoded_to_npy(encoder, folder, tmp_path):
    photos, names, images = folder
    output = tmp_path / "out" / "f.npy"
    message = encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    record, features, codes = _npy(output)
    assert record["files"] == names
    assert {b["file"] for b in record["broken"]} == {"3-broken.jpg", "inner/empty.png"}
    assert "2 cannot be read" in message
    np.testing.assert_allclose(features, encoder(images), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(codes, encoder.codes(images))
    assert sorted(p.name for p in output.parent.iterdir()) == [
        "f.codes.npy",
        "f.npy",
        "f.npy.json",
    ]
    again = encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    assert again.endswith("is done")
    with pytest.raises(UserError, match="computed with different images, weights or options"):
        encode_folder(encoder, open_folder(str(photos)), str(output))


def test_a_folder_is_encoded_to_parquet(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_encoding, "PART_SIZE", 4)
    photos, names, images = folder
    output = tmp_path / "f.parquet"
    encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    table = pq.read_table(output)
    assert table["file"].to_pylist() == names
    found = np.asarray(table["features"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, encoder(images), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(table["codes"].to_pylist(), encoder.codes(images))


def test_a_stopped_run_resumes_from_its_valid_parts(encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_encoding, "PART_SIZE", 2)
    photos, names, images = folder
    source, output = open_folder(str(photos)), tmp_path / "f.npy"
    encoded = []

    def until(limit):
        def crop_file(content):
            encoded.append(content)
            if len(encoded) > limit:
                raise KeyboardInterrupt
            return Encoder.crop_file(encoder, content)

        return crop_file

    monkeypatch.setattr(encoder, "crop_file", until(5))
    with pytest.raises(KeyboardInterrupt):
        encode_folder(encoder, source, str(output), codes=True)
    parts = tmp_path / "f.npy.parts"
    first, second = sorted(parts.glob("*/*.npz"))
    assert (first.name, second.name) == ("00000000.npz", "00000001.npz")
    assert not output.exists()
    second.write_bytes(second.read_bytes()[:100])

    encoded.clear()
    monkeypatch.setattr(encoder, "crop_file", until(100))
    encode_folder(encoder, source, str(output), codes=True)
    assert len(encoded) == 7  # all but the first part's two
    record, features, _ = _npy(output)
    assert record["files"] == names
    monkeypatch.undo()
    np.testing.assert_allclose(features, encoder(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["f.npy", "f.parquet"])
def test_shares_give_what_one_call_gives(encoder, folder, tmp_path, monkeypatch, name):
    monkeypatch.setattr(folder_encoding, "PART_SIZE", 2)
    source = open_folder(str(folder[0]))
    whole, output = tmp_path / "whole" / name, tmp_path / "shared" / name

    def share(index, count):
        return encode_folder(encoder, source, str(output), codes=True, share=Share(index, count))

    encode_folder(encoder, source, str(whole), codes=True)
    assert share(1, 3) == f"share 1/3 of {output} is done, and others are not; the last one " + (
        "writes the output"
    )
    assert "share 2/3" in share(2, 3)
    assert not output.exists()
    assert "features of 7 images; 2 cannot be read" in share(0, 3)
    assert share(1, 3).endswith("is done")
    found, expected = (
        {path.name: path.read_bytes() for path in file.parent.iterdir()} for file in (output, whole)
    )
    assert found == expected


def test_parts_of_other_images_are_recomputed(encoder, folder, tmp_path, capsys):
    photos, names, _ = folder
    output = tmp_path / "f.npy"
    parts = tmp_path / "f.npy.parts"
    parts.mkdir()
    (parts / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not a resumable `encode` directory"):
        encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    (parts / "letter.txt").rename(parts / "parts.json")  # as of an older version
    encode_folder(encoder, open_folder(str(photos)), str(output), codes=True)
    assert "by an older version of music_jax: starting from" in capsys.readouterr().out
    assert _npy(output)[0]["files"] == names


def test_changed_pixels_are_detected(encoder, folder, tmp_path):
    photos, _, images = folder
    output = tmp_path / "f.npy"
    encode_folder(encoder, open_folder(str(photos)), str(output))
    assert encode_folder(encoder, open_folder(f"{photos}/"), str(output)).endswith("is done")
    before = os.stat(photos / "0.png")
    cv2.imwrite(str(photos / "0.png"), 255 - images[0])
    assert os.stat(photos / "0.png").st_mtime_ns != before.st_mtime_ns
    with pytest.raises(UserError, match="computed with different images, weights or options"):
        encode_folder(encoder, open_folder(str(photos)), str(output))


def test_names_that_are_not_utf8_are_escaped(encoder, folder, tmp_path):
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


def test_an_output_in_a_bucket_is_refused(encoder, folder):
    with pytest.raises(UserError, match="must be on a local or shared disk, not in a bucket"):
        encode_folder(encoder, open_folder(str(folder[0])), "gs://bucket/x.npy")


def test_parts_of_wide_features_can_be_read(tmp_path):
    part, features = tmp_path / "0.npz", np.zeros((1024, 20_000), np.float32)
    names = np.frombuffer(json.dumps({"files": ["a"] * 1024, "broken": []}).encode(), np.uint8)
    np.savez(part, features=features, codes=np.zeros((1024, 0), np.int32), names=names)
    assert folder_encoding._read_part(part, 20_000).features.shape == features.shape


def test_a_folder_without_valid_images_is_an_error(encoder, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no")
    source = open_folder(str(tmp_path / "photos"))
    with pytest.raises(
        UnusableDataError, match=r"none of the 1 images can be read, such as a\.png"
    ):
        encode_folder(encoder, source, str(tmp_path / "f.npy"))
    with pytest.raises(UserError, match=r"must end with \.npy or \.parquet"):
        encode_folder(encoder, source, str(tmp_path / "f.csv"))


def test_a_missing_parquet_package_is_an_error_before_anything_is_computed(
    encoder, folder, tmp_path, monkeypatch
):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"this needs pyarrow.*\[export\]"):
        encode_folder(encoder, open_folder(str(folder[0])), str(tmp_path / "f.parquet"))
    assert not (tmp_path / "f.parquet.parts").exists()


def _command(*arguments):
    return [sys.executable, "-m", "music_jax.encode", *arguments]


@pytest.mark.slow
def test_a_stopped_command_resumes(workdir, tmp_path):
    (tmp_path / "photos").mkdir()
    content = cv2.imencode(".png", philox_images(1, 28, 1)[0])[1].tobytes()
    for i in range(30_000):
        (tmp_path / "photos" / f"{i:05d}.png").write_bytes(content)
    output = tmp_path / "f.npy"
    command = _command(
        f"--workdir={workdir}", f"--images={tmp_path / 'photos'}", f"--output={output}"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("f.npy.parts/*/*.npz")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    shares = [
        subprocess.Popen(
            [*command, f"--worker={i}/2"], env=environment, stdout=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    outputs = [share.communicate()[0] for share in shares]
    assert [share.returncode for share in shares] == [0, 0], outputs
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "f.npy is done" in done.stdout
    assert "f.npy holds 1024 features of 30,000 images" in "".join(outputs)
    features = np.load(output)
    np.testing.assert_allclose(features, np.broadcast_to(features[0], features.shape), rtol=1e-5)
