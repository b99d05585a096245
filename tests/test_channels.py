"""Sets of thirteen channels of float32 and of one of uint16, from their files to the report."""

import json

import jax.export
import numpy as np
import pytest
from channel_sets import BANDS, DEPTH, NO_STATISTICS, SMALL, write_bands, write_depth
from processes import free_port, metrics, run, start

import music_jax
from music_jax.config import default_config
from music_jax.data.crops import center_crop
from music_jax.data.datasets import open_path, training_source
from music_jax.data.decode import decode
from music_jax.errors import UserError

_SETS = {"bands": (write_bands, BANDS), "depth": (write_depth, DEPTH)}


@pytest.fixture(scope="module", params=["bands", pytest.param("depth", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory):
    """The name of a set, its folder with the run, the training images and main's output."""
    write, fields = _SETS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    images = write(folder / "train", 48)
    write(folder / "test", 24, seed=1)
    code, out, err = run(*_main(folder, *fields, NO_STATISTICS))
    assert code == 0, err
    return request.param, folder, images, out


def _main(folder, *fields):
    sets = (
        f"--config.dataset.path={folder / 'train'}",
        f"--config.evaluation.test={folder / 'test'}",
        f"--config.evaluation.train={folder / 'train'}",
        f"--workdir={folder / 'run'}",
    )
    return ("music_jax.main", *SMALL, *sets, *fields)


def _saved(folder):
    return json.loads((folder / "run" / "config.json").read_text())["config"]["dataset"]


def test_it_trains_with_the_statistics_of_its_images_and_is_probed(trained):
    name, folder, images, out = trained
    assert metrics(folder / "run")[-1]["step"] == 6
    values, saved = np.stack(images).astype(np.float64), _saved(folder)
    values = values.reshape(-1, saved["num_channels"])
    np.testing.assert_allclose(saved["mean"], values.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(saved["std"], values.std(axis=0), rtol=1e-5)
    unchanged = "jitter, grayscale, solarize need one or three channels"
    assert (unchanged in out) == (name == "bands")
    linear = json.loads((folder / "run" / "linear_eval.json").read_text())
    assert (linear["num_train"], linear["num_test"]) == (48, 24)
    assert linear["top1"] > 0.6


@pytest.mark.slow
def test_the_same_command_resumes_the_run_with_the_statistics_that_it_has(trained):
    name, folder, _, _ = trained
    code, out, err = run(*_main(folder, *_SETS[name][1], NO_STATISTICS))
    assert code == 0, err
    assert "is done: 6 steps" in out
    mean = f"--config.dataset.mean={(1.0,) * len(_saved(folder)['mean'])}"
    code, _, err = run(*_main(folder, *_SETS[name][1], mean, mean.replace("mean", "std")))
    assert code == 2
    assert "dataset.mean:" in err


@pytest.mark.slow
def test_its_features_are_the_same_everywhere(trained, tmp_path):
    """From arrays, from files, from `encode` and from exported backbones."""
    import onnxruntime

    name, folder, _, _ = trained
    workdir, test = folder / "run", folder / "test"
    encoder = music_jax.load(workdir)
    images = _SETS[name][0](tmp_path / "again", 24, seed=1)
    if name == "depth":
        images = [image[..., None] for image in images]
    expected = encoder(images)
    files = sorted(str(path) for path in test.rglob("*.*"))
    np.testing.assert_array_equal(encoder(files), expected)
    for command, arguments in (
        ("encode", (f"--images={test}", f"--output={tmp_path}/features.npy")),
        *(
            ("export", (f"--format={format}", f"--output={tmp_path}/backbone.{format}"))
            for format in ("stablehlo", "safetensors", "orbax", "onnx")
        ),
    ):
        code, _, err = run(f"music_jax.{command}", f"--workdir={workdir}", *arguments)
        assert code == 0, err
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), expected, atol=1e-5)
    again = music_jax.load(tmp_path / "backbone.safetensors")
    np.testing.assert_allclose(again(images), expected, atol=1e-6)
    crops = np.stack([center_crop(image, 16, 20) for image in images])
    program = jax.export.deserialize(bytearray((tmp_path / "backbone.stablehlo").read_bytes()))
    np.testing.assert_allclose(program.call(crops), expected, atol=1e-5)
    saved = _saved(folder)
    normalized = (crops - np.float32(saved["mean"])) / np.float32(saved["std"])
    session = onnxruntime.InferenceSession(tmp_path / "backbone.onnx")
    (found,) = session.run(["features"], {"images": normalized.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, expected, atol=1e-5)
    card = (tmp_path / "backbone.stablehlo.md").read_text()
    kind = "float32 [batch, 16, 16, 13]" if name == "bands" else "uint16 [batch, 16, 16, 1]"
    assert kind in card
    assert "divided by 255" not in card


@pytest.mark.slow
def test_it_is_evaluated_and_reported(trained):
    name, folder, _, _ = trained
    code, out, err = run(
        "music_jax.evaluate", f"--workdir={folder / 'run'}", "--protocols=knn,label_free"
    )
    assert code == 0, err
    code, out, err = run("music_jax.report", f"--workdir={folder / 'run'}")
    assert code == 0, err
    assert "no images are shown" not in out + err
    page = (folder / "run" / "report.html").read_text()
    assert ("13 channels float32" if name == "bands" else "gray uint16") in page
    assert page.count("data:image/webp") == 3  # of the images, of views and of errors


@pytest.mark.slow
def test_packed_images_are_those_of_the_folder(trained, tmp_path):
    name, folder, images, _ = trained
    fields = [field.replace("config.dataset.num_", "").replace("config.dataset.", "")
              for field in _SETS[name][1]]  # fmt: skip
    arguments = (f"--source={folder / 'train'}", f"--output={tmp_path / 'packed'}")
    code, _, err = run("music_jax.pack", *arguments, "--encoding=npy", *fields)
    assert code == 0, err
    source, dtype = open_path(str(tmp_path / "packed")), images[0].dtype
    assert len(source) == len(images)
    for i, image in enumerate(images):
        found = decode(source.example(i)[0], 13 if name == "bands" else 1, dtype=dtype)
        np.testing.assert_array_equal(found.squeeze(), image)


def test_statistics_are_printed_as_fields_of_the_config(tmp_path):
    images = write_depth(tmp_path / "images", 8)
    code, out, err = run(
        "music_jax.channel_statistics",
        "--config=folder",
        f"--config.dataset.path={tmp_path / 'images'}",
        *DEPTH,
        "--count=8",
    )
    assert code == 0, err
    values = np.stack(images).astype(np.float64)
    for name, expected in (("mean", values.mean()), ("std", values.std())):
        (line,) = (x for x in out.splitlines() if x.startswith(f"config.dataset.{name} = ("))
        assert float(line.partition("(")[2].rstrip(",)")) == pytest.approx(expected, rel=1e-5)


def test_another_number_of_channels_or_type_is_an_error_that_names_both(tmp_path):
    write_bands(tmp_path / "images", 6)
    for channels, pixel_type, message in (
        (3, "uint8", "class0/000.tif .*: it has 13 channels, not 3; .*, now 3 and uint8, to those"),
        (13, "uint8", "its values are float32, not uint8"),
        (13, "uint16", "its values are float32, not uint16"),
    ):
        config = default_config()
        dataset = {"path": str(tmp_path / "images"), "num_channels": channels}
        config.dataset.update(dataset | {"pixel_type": pixel_type})
        with pytest.raises(UserError, match=message):
            training_source(config)
    (tmp_path / "images" / "class0" / "000.tif").write_bytes(b"broken")
    config.dataset.pixel_type = "float32"
    assert len(training_source(config)) == 6


@pytest.mark.slow
def test_two_processes_train_with_the_statistics_that_the_first_one_computes(tmp_path):
    write_depth(tmp_path / "train", 32)
    write_depth(tmp_path / "test", 16, seed=1)
    port, processes = free_port(), []
    for i in range(2):
        cluster = (
            f"--coordinator_address=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={i}",
        )
        cache = {"XDG_CACHE_HOME": str(tmp_path / f"cache{i}")}
        processes.append(start(*_main(tmp_path, *DEPTH, NO_STATISTICS, *cluster), env=cache))
    for process in processes:
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    assert len(list((tmp_path / "cache0").rglob("statistics/*.json"))) == 1
    assert not list((tmp_path / "cache1").rglob("statistics/*.json"))
    assert _saved(tmp_path)["mean"][0] > 1000
