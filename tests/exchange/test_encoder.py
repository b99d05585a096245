"""`music_jax.load`, and the exit codes of the commands of this package."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
from philox_weights import philox_images
from small_runs import save_run, small_config

import music_jax
from music_jax.data.augment import normalize_images
from music_jax.errors import UserError
from music_jax.exchange.encoder import Encoder, load_backbone
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


def test_features_and_codes_are_those_of_the_network(workdir, encoder):
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


def test_results_do_not_depend_on_the_batch_size(workdir, encoder):
    images = philox_images(11, 28, 1)
    expected = encoder(images)
    small = Encoder(load_backbone(str(workdir[0])), batch_size=4)
    np.testing.assert_allclose(small(list(images[..., 0])), expected, rtol=1e-5, atol=1e-5)
    assert encoder([]).shape == (0, encoder.num_features)


def test_arrays_and_files_of_any_size_are_cropped_alike(encoder, tmp_path):
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
        ("photo.jpg", ValueError, "images must be a list"),
        (["nowhere.jpg"], UserError, "nowhere.jpg.*No such file"),
        ([__file__], UserError, "it is no JPEG"),
    ],
)
def test_wrong_images_are_rejected(images, error, message, encoder):
    with pytest.raises(error, match=message):
        encoder(images)


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
def test_wrong_input_gives_exit_code_2_and_one_line(module, arguments, message, tmp_path):
    command = [sys.executable, "-m", f"music_jax.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
