"""The networks of a report in Chromium, against `music_jax.load` and on images of a reader."""

import base64
import dataclasses
import re
import types
from unittest import mock

import cv2
import numpy as np
import pytest
from sklearn.datasets import load_digits
from small_runs import save_run, small_config

import music_jax
from music_jax.evaluation.results import Classifier, write_classifier
from music_jax.metrics.linear_probe import ProbeRecipe, linear_probe
from music_jax.report import measures, page
from music_jax.report.in_page import network_data
from tests.report.browsers import Opened, chromium
from tests.report.reports import make_reported, make_sample, write_workdir

pytestmark = pytest.mark.browser

DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)
LABELS = load_digits().target

# Applies a network to files, decoded by the browser.
_APPLY = """async ([text, segments, files]) => {
  const network = unpackedAll(JSON.parse(text));
  const results = [];
  for (const file of files) {
    const bytes = Uint8Array.from(atob(file), (c) => c.charCodeAt(0));
    const image = await readImage(new File([bytes], "a.png", { type: "image/png" }));
    const { view, features, codes } = appliedTo(network, image, segments);
    results.push({ view: [...view.values], features: [...features], codes });
  }
  return results;
}"""

_CONFIGS = {
    "cifar": {"backbone.stem": "cifar", "crop.size": 8, "crop.eval_resize": 8},
    "strided": {"backbone.name": "tiny_resnet", "projector.hidden_sizes": ()},
    # Max-pooling, a global average, color, a crop of 31 of 36 pixels, and centered embeddings.
    "pooled": {
        "backbone.name": "pooled_resnet",
        "backbone.stem": "imagenet",
        "crop.size": 31,
        "crop.eval_resize": 36,
        "dataset.num_channels": 3,
        "dataset.mean": (0.4, 0.5, 0.3),
        "dataset.std": (0.2, 0.3, 0.25),
        "objective.center": True,
        "objective.temperature": 0.5,
        "projector.hidden_sizes": (32, 16),
    },
}


def _config(name):
    config = small_config()
    config.dataset.name = "digits"
    config.update_from_flattened_dict(_CONFIGS[name])
    return config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Runs whose weights are random."""
    root = tmp_path_factory.mktemp("runs")
    for name in _CONFIGS:
        save_run(root / name, _config(name))
    return root


@pytest.fixture(scope="module")
def encoders(root):
    return {name: music_jax.load(str(root / name)) for name in _CONFIGS}


@pytest.fixture(scope="module")
def report(root, encoders):
    """A report of the first run, with a linear probe; its encoder and the probe's predictions."""
    run, encoder = root / "cifar", encoders["cifar"]
    features = encoder(list(DIGITS))
    probe = linear_probe(
        *(features[:1400], LABELS[:1400], features[1400:], LABELS[1400:]),
        ProbeRecipe(20, 128, (0.1,)),
        num_classes=10,
        feature_scaling="standardize",
    )
    assert probe.top1 > 0.85
    kernel, bias = probe.classifier()
    write_classifier(run, Classifier(kernel, bias, encoder.trained.step))
    with mock.patch.object(measures, "tsne_map", return_value=None):
        path, size = page.write_report([str(run)], num_images=60)
    assert size < page.MAX_BYTES
    return types.SimpleNamespace(path=path, encoder=encoder, predicted=probe.predictions)


@pytest.fixture(scope="module")
def browser(report, encoders):  # after the runs: no event loop may run while they are read
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")  # opening it takes longer than the tests
def opened(browser, report):
    found = Opened(browser, report.path)
    yield found
    assert found.errors == []
    assert [x for x in found.requests if not x.startswith(("data:", "blob:"))] == [
        report.path.as_uri()
    ]
    found.close()


def _png(image):
    order = image[..., ::-1] if image.ndim == 3 else image
    return cv2.imencode(".png", order)[1].tobytes()


def _assert_equal(opened, encoder, images, tmp_path):
    """Compares features and codes of PNG files by the page with those by `music_jax.load`."""
    paths = [tmp_path / f"{i}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(_png(image))
    features, probabilities = encoder(paths), encoder.probabilities(paths)
    trained = encoder.trained
    sample = types.SimpleNamespace(features=features)
    text = page._as_json(network_data(trained, sample, None))
    temperature = trained.config.objective.temperature
    segments = {"units": probabilities.shape[2], "temperature": temperature}
    files = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    found = opened.page.evaluate(_APPLY, [text, segments, files])
    views = np.asarray([result["view"] for result in found])
    expected = [encoder.crop_file(path.read_bytes()).ravel() for path in paths]
    np.testing.assert_array_equal(views, expected)
    scale = np.abs(features).max()
    theirs = np.asarray([result["features"] for result in found])
    np.testing.assert_allclose(theirs, features, atol=1e-4 * scale)
    codes = np.asarray([result["codes"] for result in found])
    np.testing.assert_allclose(codes, probabilities, atol=1e-3)
    second, first = np.sort(probabilities, axis=2)[..., -2:].transpose(2, 0, 1)
    sure = first - second >= 1e-3
    assert np.mean(sure) > 0.9
    np.testing.assert_array_equal(codes.argmax(2)[sure], probabilities.argmax(2)[sure])


def test_a_hundred_test_images_have_the_codes_of_load(opened, report, tmp_path):
    _assert_equal(opened, report.encoder, DIGITS[-100:], tmp_path)


@pytest.mark.parametrize("name", _CONFIGS)
def test_images_of_other_sizes_and_colors_have_the_codes_of_load(name, opened, encoders, tmp_path):
    """Larger ones, by whole factors and others, smaller ones, strips, and a single pixel."""
    rng = np.random.default_rng(0)
    sizes = [(16, 16), (24, 40), (72, 36), (56, 84), (61, 45), (100, 333), (31, 31), (36, 36)]
    sizes += [(5, 7), (3, 20), (27, 29), (1, 1), (1, 40), (90, 5), (2, 35)]
    images = [
        rng.integers(256, size=(*size, 3)[: 2 + i % 2], dtype=np.uint8)
        for i, size in enumerate(2 * sizes)
    ]
    _assert_equal(opened, encoders[name], images, tmp_path)


def test_dropping_a_file_shows_its_class_its_neighbors_and_its_codes(opened, report, tmp_path):
    chosen = int(np.flatnonzero(report.predicted == LABELS[1400:])[0])
    path = tmp_path / "dropped.png"
    path.write_bytes(_png(DIGITS[1400 + chosen]))
    view = opened.page
    target = view.locator("#try-it h2")
    target.scroll_into_view_if_needed()
    box = target.bounding_box()
    session = view.context.new_cdp_session(view)
    data = {"items": [], "files": [str(path)], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        place = {"x": box["x"] + 20, "y": box["y"] + 10}
        session.send("Input.dispatchDragEvent", {"type": kind, **place, "data": data})
    status = view.get_by_role("status")
    status.filter(has_text="dropped.png: class").wait_for()
    assert f"dropped.png: class {LABELS[1400 + chosen]} (" in status.inner_text()
    panel = view.locator("#try-it [data-tried]")
    assert panel.locator(".near .thumb").count() == 8
    codes = report.encoder.codes([path])[0]
    shown = re.findall(r"segment (\d+): unit (\d+), [\d.]+ %", panel.inner_text())
    assert dict((int(s), int(k)) for s, k in shown) == dict(enumerate(codes.tolist()))
    assert panel.get_by_role("heading", level=3).count() == 4  # below the section's
    panel.locator(".near .thumb").first.click()
    assert view.locator(".row.chosen").count() == 1


def test_a_file_that_is_no_image_gives_one_message(opened, tmp_path):
    name = "<img src=x onerror=alert(1)>.png"
    (tmp_path / name).write_text("no image")
    (tmp_path / "digit.png").write_bytes(_png(DIGITS[0]))
    chooser, status = opened.page.get_by_label("image file"), opened.page.get_by_role("status")
    chooser.set_input_files(tmp_path / name)
    status.filter(has_text="cannot be read").wait_for()
    assert status.inner_text().startswith(f"{name} cannot be read as an image; choose a PNG")
    chooser.set_input_files(tmp_path / "digit.png")
    status.filter(has_text="digit.png: class").wait_for()
    clear = np.dstack([DIGITS[0]] * 4)
    (tmp_path / "clear.png").write_bytes(cv2.imencode(".png", clear)[1].tobytes())
    chooser.set_input_files(tmp_path / "clear.png")
    status.filter(has_text="transparent pixels may be read differently").wait_for()


def test_several_runs_apply_their_networks_to_the_same_image(browser, encoders, tmp_path):
    """One without a saved probe, and one without segments whose network takes color."""
    shown = []
    for name, objective in (("strided", "music"), ("pooled", "vicreg")):
        sample = make_sample()
        reported = make_reported(write_workdir(tmp_path / name, objective=objective), sample)
        network = network_data(encoders[name].trained, sample, None)
        shown.append(dataclasses.replace(reported, network=page._compress(page._as_json(network))))
    (tmp_path / "two.html").write_bytes(page.render(shown))
    (tmp_path / "digit.png").write_bytes(_png(DIGITS[0]))
    opened = Opened(browser, tmp_path / "two.html")
    opened.page.get_by_label("image file").set_input_files(tmp_path / "digit.png")
    status = opened.page.get_by_role("status")
    status.filter(has_text="nearest").wait_for()
    for name in ("strided", "pooled"):
        assert f"{name}: digit.png: the nearest image is " in status.inner_text()
    first, second = opened.page.locator("#try-it [data-tried]").all()
    assert "music_jax.linear_eval saves it" in first.inner_text()
    assert first.locator(".codes li").count() == 6
    assert second.locator(".codes li").count() == 0
    assert second.locator(".near .thumb").count() == 8
    assert second.get_by_role("heading", level=4).count() == 3  # below the run's
    assert opened.errors == []
    opened.close()


def test_a_drawing_is_classified_and_can_be_cleared(opened):
    view = opened.page
    canvas, status = view.locator("#try-it-canvas"), view.get_by_role("status")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    bright = """([element]) => element.getContext("2d")
        .getImageData(0, 0, element.width, element.height).data.filter((v) => v > 128).length"""
    count = lambda: canvas.evaluate(f"(element) => ({bright})([element])")  # noqa: E731
    empty = count()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 5)
    view.mouse.down()
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 4 / 5, steps=5)
    view.mouse.up()
    status.filter(has_text="the drawing: class").wait_for()
    assert count() > empty
    view.get_by_role("button", name="Clear").click()
    assert count() == empty
    view.mouse.move(box["x"] - 20, box["y"] + box["height"] / 2)
    view.mouse.down()  # outside
    view.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=5)
    view.mouse.up()
    assert count() == empty
