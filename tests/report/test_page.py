"""The page without a browser: its text, its escaping and its size."""

import dataclasses
import html.parser
import json
import re
from importlib import resources

import numpy as np
import pytest

from music_jax.errors import UserError
from music_jax.report import page, tables
from tests.report.reports import (
    HOSTILE,
    data_of,
    make_reported,
    make_sample,
    write_results,
    write_workdir,
)


class _Elements(html.parser.HTMLParser):
    """Collects the names of all elements and the text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.names, self.text, self._inside = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self._inside = tag
        assert not [name for name, _ in attrs if name.startswith("on")]
        assert ("role", "img") not in attrs or dict(attrs).get("aria-label"), (
            "a picture has no name"
        )
        addresses = [value for name, value in attrs if name in ("src", "href") and value]
        assert all(value.startswith(("#", "data:")) for value in addresses)

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A complete run."""
    path = write_workdir(tmp_path_factory.mktemp("runs") / "music")
    write_results(path)
    (path / "events.jsonl").write_text(
        '{"event": "resumed", "time": "2026-01-02T03:04:05+00:00", "step": 12}\n'
        '{"event": "rewound", "step": 20, "to_step": 12, "skipped": [19, 20]}\n'
    )
    (path / "rewinds.json").write_text(
        '{"rewinds": [{"step": 20, "what": "the loss spiked", "skipped": [19, 20]}]}'
    )
    (path / "skipped.jsonl").write_text(
        '{"source": "digits:train", "image": "</td><script>alert(2)</script>", "reason": "bad"}\n'
    )
    return make_reported(path, make_sample())


def test_the_page_shows_all_parts_of_a_run(finished):
    text = page.render([finished]).decode()
    found = _Elements(text)
    words = " ".join(" ".join(found.text).split())
    for part in (
        "finished, 30 steps",
        "30 = 6 segments × 5 units",
        "1,000 images",
        "compared with raw pixels",
        "random backbone",
        "0 after a collapse, 1.61 at the optimum",
        "if all were copies of one",
        "for 29 of 30 steps",
        "Most confident errors",
        "resumed: 1",
        "the loss spiked",
        "1 in digits:train",
        "40 of the 400 images of digits:test",
        "Most frequent errors",
        HOSTILE,
    ):
        assert part in words, part
    alt = re.search(r'data-curve="0" role="img" aria-label="([^"]*)"', text)[1]
    assert "in nats" in alt
    assert "Quality of the backbone" in words
    assert "RankMe (dimensions) Effective rank of the features." in words
    assert "-1.8 at step 1, -4.7 at step 30, bound -4.828" in alt
    run = data_of(text)["runs"][0]
    order = [curve.name for curve in tables.curves([finished.recorded])]
    bounds = dict(zip(order, run["bounds"], strict=True))
    assert bounds["loss"] == pytest.approx(-3 * np.log(5))
    assert bounds["cross_segment"] == pytest.approx(-2 * np.log(5))
    assert bounds["learning_rate"] is None
    drawn = dict(zip(order, run["curves"]["values"], strict=True))
    assert drawn["images_per_second"][:2] == [None, 640.0]
    assert max(drawn["online_top1"]) == pytest.approx(100 * 30 / 35, rel=1e-4)


def test_text_from_the_run_is_escaped(finished):
    text = page.render([finished]).decode()
    found = _Elements(text)
    assert found.names.count("script") == 3  # the library, the data, ours
    assert "img" not in found.names
    assert text.count("<script>") == 1
    assert "alert(" not in text.replace("&lt;script&gt;window.hacked=1;alert(1)", "").replace(
        "&lt;script&gt;alert(2)", ""
    )
    assert "default-src 'none'" in text


def _with_several_classes(path):
    scores = {"mean_average_precision": 0.6, "random_init_mean_average_precision": 0.4}
    scores |= {"raw_pixels_mean_average_precision": None, "step": 30}
    (path / "linear_eval.json").write_text(json.dumps(scores))
    return path


def _without_labels(path):
    about = json.loads((path / "config.json").read_text())
    about["config"]["dataset"] |= {"name": "", "path": "photos"}
    (path / "config.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize(
    ("prepare", "parts"),
    [
        (
            lambda path: make_reported(write_workdir(path / "run", logged=10)),
            ("not finished: 10 of 30 steps (33 %)", "no checkpoint", "There are no results yet"),
        ),
        (
            lambda path: make_reported(write_workdir(path / "run", logged=0)),
            ("no step is logged yet", "No step has been logged yet", "There are no results yet"),
        ),
        (
            lambda path: make_reported(_without_labels(write_workdir(path / "run"))),
            ("The backbone was not evaluated", "--config.evaluation.test=FOLDER"),
        ),
        (
            lambda path: make_reported(
                write_workdir(path / "run", objective="vicreg"), make_sample(channels=1)
            ),
            ("The objective vicreg has no segments", "there is no linear probe yet"),
        ),
        (
            lambda path: make_reported(
                write_workdir(path / "run"), make_sample(labeled=False, images=4)
            ),
            ("there are too few images, or the network gives all of them the same output",),
        ),
        (
            lambda path: dataclasses.replace(
                make_reported(write_workdir(path / "run"), make_sample()), no_network="too <b>large"
            ),
            ("Try it on an image Not shown: too <b>large.",),
        ),
        (
            lambda path: make_reported(_with_several_classes(write_workdir(path / "run"))),
            ("Confusions of the linear probe Not shown: images may have several classes.",),
        ),
    ],
)
def test_missing_parts_are_explained(prepare, parts, tmp_path):
    text = page.render([prepare(tmp_path)]).decode()
    words = " ".join(" ".join(_Elements(text).text).split())
    for part in parts:
        assert part in words, part


def test_runs_side_by_side_share_images_and_list_their_differences(finished, tmp_path):
    other = make_reported(
        write_workdir(tmp_path / "other", objective="vicreg"), make_sample(seed=1)
    )
    sample = make_sample()
    third = make_reported(write_workdir(tmp_path / "third", seed=3), sample)
    text = page.render([finished, other, third]).decode()
    runs = data_of(text)["runs"]
    assert [run["name"] for run in runs] == ["music", "other", "third"]
    sprites = [run["images"]["sprite"] for run in runs]
    assert sprites[0] == sprites[2] != sprites[1]
    assert text.count(f".{sprites[0]}{{") == 1
    assert "The training configs differ in" in text
    assert re.search(r"differ in [^<]*objective.name", text)
    words = " ".join(" ".join(_Elements(text).text).split())
    assert "points from music" in words
    assert "other seeds" in words


def test_pictures_shrink_until_the_report_fits(finished, monkeypatch):
    usual = page.render([finished])
    monkeypatch.setattr(page, "MAX_BYTES", len(usual) - 1)
    smaller = page.render([finished])
    assert len(smaller) < len(usual)
    assert data_of(smaller.decode())["runs"][0]["images"]["tile"] < 24
    monkeypatch.setattr(page, "MAX_BYTES", 100_000)
    with pytest.raises(UserError, match=r"--workdir.*--images"):
        page.render([finished])


def test_a_network_is_omitted_if_the_report_does_not_fit_otherwise(finished, monkeypatch):
    usual = page.render([finished])
    monkeypatch.setattr(page, "MAX_BYTES", len(usual) + 1000)
    text = page.render([dataclasses.replace(finished, network="A" * len(usual))]).decode()
    assert "Not shown: it does not fit in the page." in text
    assert 'id="network-0"' not in text
    assert data_of(text)["runs"][0]["images"]["tile"] == 24


def test_classes_may_have_large_numbers(tmp_path):
    sample = make_sample()
    labels = np.where(sample.labels > 0, 40_000, 0).astype(np.int32)
    sample = sample._replace(labels=labels, class_names=(), num_classes=40_001)
    html = page.render([make_reported(write_workdir(tmp_path / "run"), sample)])
    images = data_of(html.decode())["runs"][0]["images"]
    np.testing.assert_array_equal(images["labels"], labels)


@pytest.mark.slow
def test_a_thousand_classes_and_thousands_of_units_stay_below_ten_megabytes(tmp_path):
    """Different images of noise in each run, which no format compresses well."""
    shown = []
    for seed in range(3):
        path = write_workdir(tmp_path / str(seed), segments=102, units=80, seed=seed)
        write_results(path, images=5000, classes=1000)
        sample = make_sample(images=1000, classes=1000, segments=102, units=80, side=96, seed=seed)
        shown.append(make_reported(path, sample))
    html = page.render(shown)
    assert len(html) < 10e6
    runs = data_of(html.decode())["runs"]
    assert len(runs[0]["confusion"]["names"]) == 41
    assert runs[0]["segments"]["joint"]["levels"].shape[0] <= 1024


def _variables(block):
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def _luminance(color):
    channels = np.asarray([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _contrast(a, b):
    low, high = sorted((_luminance(a), _luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colors_have_the_contrast_required_by_wcag():
    """4.5 for text and 3 for lines and dots, in both themes, which define the same colors."""
    files = resources.files("music_jax.report") / "page"
    style = (files / "report.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", style)
    light, dark, unscripted = map(_variables, blocks)
    assert dark == unscripted
    assert light.keys() == dark.keys()
    script = (files / "charts.js").read_text()
    for theme, values in (("light", light), ("dark", dark)):
        for text in ("text", "muted", "accent", "good", "bad"):
            for back in ("back", "surface"):
                assert _contrast(values[text], values[back]) >= 4.5, (theme, text, back)
        assert _contrast(values["text"], values["mark"]) >= 4.5
        palettes = re.findall(rf"{theme}: \[([^\]]*)\]", script)
        assert len(palettes) == 2
        for color in re.findall(r"#[0-9a-f]{6}", " ".join(palettes)):
            assert _contrast(color, values["back"]) >= 3, (theme, color)
