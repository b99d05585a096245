"""Takes the pictures of a report that the documentation shows, in a headless Chromium.

.venv/bin/python docs/report_pictures.py runs/mnist5k/report.html docs
"""

import pathlib
import shutil
import sys

from playwright.sync_api import Browser, Page, sync_playwright


def open_page(browser: Browser, report: str, theme: str, width: int, height: int) -> Page:
    """The report in a window of this size, once it is drawn."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.set_default_timeout(300_000)
    page.goto(pathlib.Path(report).resolve().as_uri())
    page.wait_for_selector("html[data-ready]")
    return page


def show(page: Page, heading: str, chart: str) -> None:
    """Scrolls a section to below the page's bar and waits for its chart."""
    page.get_by_role("heading", name=heading).evaluate(
        "(it) => { it.scrollIntoView(); window.scrollBy(0, -45); }"
    )
    page.locator(f"{chart} .plot-container").first.wait_for()
    page.wait_for_timeout(2000)


def main(report: str, output: str) -> None:
    """Takes them."""
    directory = pathlib.Path(output)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = open_page(browser, report, "light", 1280, 1000)
        show(page, "What the units stand for", ".chart")
        page.screenshot(path=directory / "report-light.png")

        page = open_page(browser, report, "dark", 1280, 900)
        show(page, "Map of the embedding", "[data-map]")
        dots = page.locator("[data-map] .points path")
        dots.first.wait_for()
        page.wait_for_timeout(2000)
        box = dots.nth(40).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.locator("#preview .thumb").wait_for()
        page.screenshot(path=directory / "report-dark.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
