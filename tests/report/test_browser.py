"""The report in a real browser: no errors, no requests, and working controls."""

import itertools

import pytest

from music_jax.report import page
from tests.report.browsers import Opened, chromium
from tests.report.reports import (
    HOSTILE,
    HOSTILE_TAG,
    make_reported,
    make_sample,
    write_results,
    write_workdir,
)

pytestmark = pytest.mark.browser

_PHONE = {"width": 360, "height": 740, "touch": True}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """A report of one complete run, and a report of three different runs."""
    root = tmp_path_factory.mktemp("reports")
    path = write_workdir(root / "music")
    write_results(path)
    music = make_reported(path, make_sample())
    vicreg = make_reported(
        write_workdir(root / "vicreg", objective="vicreg", logged=12),
        make_sample(labeled=False, channels=1, side=96),
    )
    bare = make_reported(write_workdir(root / "bare", logged=0))
    files = {"one": [music], "three": [music, vicreg, bare]}
    for name, shown in files.items():
        (root / f"{name}.html").write_bytes(page.render(shown))
    return {name: root / f"{name}.html" for name in files}


@pytest.fixture(scope="module")
def browser(reports):  # after the reports: no event loop may run while checkpoints are read
    with chromium() as running:
        yield running


@pytest.fixture
def opened(browser, reports):
    found = Opened(browser, reports["one"])
    yield found
    assert found.errors == []
    found.close()


@pytest.mark.parametrize("name", ["one", "three"])
@pytest.mark.parametrize("how", [{"dark": True}, _PHONE])
def test_the_report_opens_from_disk_without_errors_or_requests(name, how, browser, reports):
    opened = Opened(browser, reports[name], **how)
    opened.draw_all()
    assert opened.errors == []
    others = [url for url in opened.requests if not url.startswith(("data:", "blob:"))]
    assert others == [reports[name].as_uri()]
    widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolled, width = opened.page.evaluate(widths)
    assert scrolled <= width
    assert opened.page.evaluate("document.documentElement.dataset.theme") == (
        "dark" if how.get("dark") else "light"
    )
    for chart in opened.page.locator(".chart").all():
        assert chart.get_attribute("aria-label")
    assert opened.page.locator("select").count() == opened.page.locator("label select").count()
    unnamed = opened.page.locator("button:not([aria-label])").all()
    assert all(button.inner_text().strip() for button in unnamed)
    opened.close()


def test_class_names_are_shown_as_text(opened):
    opened.draw_all()
    opened.page.locator("#map .legendtext").first.wait_for()
    legend = opened.page.locator("#map .legendtext").all_text_contents()
    assert HOSTILE in legend
    assert HOSTILE_TAG in legend
    cards = " ".join(opened.page.locator("[data-gallery] .title").all_text_contents())
    assert HOSTILE_TAG in cards
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("main img").count() == 0
    assert opened.page.locator("#map a").count() == 0


def test_choosing_a_segment_changes_the_images(opened):
    page = opened.page
    thumbs = page.locator("[data-gallery] .thumb")

    def images():
        return thumbs.evaluate_all("all => all.map(each => each.style.backgroundPosition)")

    before, text = images(), page.locator("[data-segment-text]").inner_text()
    chosen = page.locator("[data-segment]").input_value()
    page.get_by_role("button", name="Next segment").click()
    after = page.locator("[data-segment]").input_value()
    assert after != chosen
    assert f"Segment {after}:" in page.locator("[data-segment-text]").inner_text() != text
    assert images() != before
    page.locator("[data-segment]").select_option(chosen)
    assert images() == before
    assert thumbs.first.get_attribute("aria-label").startswith("image ")


def test_choosing_two_segments_or_clicking_the_matrix_shows_their_block(opened):
    page = opened.page
    whole = page.locator("[data-joint-whole]")
    whole.scroll_into_view_if_needed()
    whole.locator(".plot-container").wait_for()
    page.locator("[data-joint-a]").select_option("2")
    page.locator("[data-joint-b]").select_option("2")
    assert "Segment 2 with itself" in page.locator("[data-joint-text]").inner_text()
    box = whole.locator(".plot .hm image, .heatmaplayer image").first.bounding_box()
    place = box["x"] + box["width"] * 4.5 / 6, box["y"] + box["height"] * 1.5 / 6
    page.mouse.move(*place)
    page.locator("[data-joint-hover]", has_text="segment 1, unit").wait_for()
    assert "with segment 4, unit" in page.locator("[data-joint-hover]").inner_text()
    page.mouse.click(*place)
    page.locator("[data-joint-title]", has_text="Segments 1 and 4").wait_for()
    assert page.locator("[data-joint-a]").input_value() == "1"


def test_the_theme_can_be_changed(opened):
    page = opened.page
    opened.draw_all()
    colors = (
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector(\"[data-curve='0'] .ytitle\")).fill]"
    )
    light = page.evaluate(colors)
    button = page.locator("#theme")
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Dark", "false")
    button.click()
    dark = page.evaluate(colors)
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Light", "true")
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))
    button.click()
    assert page.evaluate(colors) == light


def test_a_dot_of_the_map_shows_its_image_and_its_neighbors(opened):
    page = opened.page
    page.locator("[data-map]").scroll_into_view_if_needed()
    dot = page.locator("[data-map] .points path").first
    dot.wait_for()
    thumb = page.locator("#preview .thumb")
    for _ in range(100):  # until the map is drawn and reacts
        box = dot.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(200)
        if thumb.is_visible():
            break
    name = thumb.get_attribute("aria-label")
    assert "probe predicts" in name
    page.mouse.down()
    page.mouse.up()
    row = page.locator(".row.chosen")
    row.wait_for()
    assert row.locator(".of .thumb").get_attribute("aria-label") == name
    assert row.locator(".near .thumb").count() == 8
    page.locator("[data-map-by]").select_option("segment 0")
    page.locator("#map .legendtext", has_text="unit").first.wait_for()


def test_curves_are_drawn_over_epochs_or_steps_with_the_bound(opened):
    page = opened.page
    page.locator("[data-curve='0']").scroll_into_view_if_needed()
    title = page.locator("[data-curve='0'] .xtitle")
    title.wait_for()
    assert title.text_content() == "epoch"
    assert "bound −4.828" in page.locator("[data-curve='0']").text_content()
    page.locator("#curves-axis").select_option("step")
    page.locator("[data-curve='0'] .xtitle", has_text="step").wait_for()


def test_the_runs_are_sorted_by_any_column(browser, reports):
    opened = Opened(browser, reports["three"])
    table = opened.page.locator("table.sortable")
    names = table.locator("tbody th")
    assert names.all_inner_texts() == ["music", "vicreg", "bare"]
    for title, expected in (
        ("run", ["bare", "music", "vicreg"]),
        ("run", ["vicreg", "music", "bare"]),
        ("wall time", ["vicreg", "music", "bare"]),  # the last one has none
        ("wall time", ["music", "vicreg", "bare"]),
    ):
        button = table.get_by_role("button", name=title)
        button.focus()
        opened.page.keyboard.press("Enter")
        assert names.all_inner_texts() == expected
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    opened.close()


@pytest.mark.parametrize("name", ["one", "three"])
def test_the_page_can_be_used_without_seeing_it_and_without_a_mouse(name, browser, reports):
    opened = Opened(browser, reports[name])
    opened.draw_all()
    page = opened.page
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(x => +x.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert page.locator(f"body > {landmark}").count() == 1
    named = page.eval_on_selector_all(
        "section[aria-labelledby], [role=region]",
        "all => all.map(x => x.ariaLabel ?? document.getElementById("
        "x.getAttribute('aria-labelledby')).textContent)",
    )
    assert all(named)
    assert len(set(named)) == len(named)
    heads = page.locator("th").all()
    assert all(head.get_attribute("scope") and head.text_content().strip() for head in heads[:60])
    assert page.locator("table:not(:has(thead th))").count() == 0
    pictures = page.locator("[role=img]:not([aria-label]), main .chart:not([aria-label])")
    assert pictures.count() == 0
    # Drawings with buttons are groups; what they show is in their label.
    assert page.locator("[role=img] :is(a, button, select)").count() == 0
    assert page.locator(".main-svg:not([aria-hidden])").count() == 0
    page.evaluate("scrollTo(0, 0)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate(outline) == "solid"
    assert opened.errors == []
    opened.close()


def test_it_prints_in_the_light_theme_with_pictures_and_charts_as_wide_as_the_paper(
    browser, reports
):
    opened = Opened(browser, reports["one"], dark=True)
    page = opened.page
    state = "[document.documentElement.dataset.theme, document.documentElement.scrollWidth]"
    widths = "all => Math.max(...all.map(x => x.getBoundingClientRect().right))"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    paper = 186 / 25.4 * 96
    assert page.evaluate(state)[0] == "light"
    assert page.eval_on_selector_all(".main-svg", widths) <= paper + 1
    assert page.locator(".chart").count() == page.locator(".chart .plot-container").count()
    assert not page.locator("nav").is_visible()
    adjust = "x => getComputedStyle(x).printColorAdjust"
    assert page.locator(".thumb").first.evaluate(adjust) == "exact"
    page.emulate_media(media="screen")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    drawing = page.locator("[data-curve='0'] .main-svg").first
    for _ in range(100):  # Plotly waits before it resizes a chart
        if drawing.bounding_box()["width"] > 1000:
            break
        page.wait_for_timeout(200)
    assert drawing.bounding_box()["width"] > 1000
    assert page.evaluate(state) == ["dark", 1280]
    opened.close()


def test_errors_of_the_probe_are_shown_below_the_confusion_matrix(opened):
    pictures = opened.page.locator("#confusions .mistakes .thumb")
    assert 0 < pictures.count() <= 12
    assert "predicted" in pictures.first.get_attribute("aria-label")
    assert "sprite-" in pictures.first.get_attribute("class")
    matrix, first = opened.page.locator("[data-confusion]"), pictures.first
    assert matrix.bounding_box()["y"] < first.bounding_box()["y"]


def test_an_old_browser_shows_a_message(browser, reports):
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(reports["one"].as_uri())
    failed = page.locator("#failed")
    failed.wait_for(state="visible")
    assert "they need a browser from 2023 or later" in failed.inner_text()
    assert page.locator("table.scores").is_visible()
    context.close()
