"""Takes the screenshots of a report for the documentation, in a headless Chromium.

.venv/bin/python -m docs.report_pictures runs/mnist5k/report.html docs
"""

import pathlib
import sys

from tests.report.browsers import Opened, chromium


def main(report: str, output: str) -> None:
    """Takes the pictures."""
    path, directory = pathlib.Path(report).resolve(), pathlib.Path(output)
    with chromium() as browser:
        page = Opened(browser, path, height=820).page
        page.locator(".strip .thumb").first.wait_for()
        page.wait_for_timeout(2000)
        page.screenshot(path=directory / "report-light.png")

        page = Opened(browser, path, dark=True).page
        page.get_by_role("heading", name="Map of the embedding").evaluate(
            "(it) => { it.scrollIntoView(); window.scrollBy(0, -45); }"
        )
        dots = page.locator("[data-map] .points path")
        dots.first.wait_for()
        page.wait_for_timeout(2000)
        box = dots.nth(40).bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.locator("#preview .thumb").wait_for()
        page.screenshot(path=directory / "report-dark.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
