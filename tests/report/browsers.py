"""Opens files in a headless Chromium and records its errors and requests."""

import contextlib
import os
import shutil

import pytest
from playwright.sync_api import sync_playwright

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_TIMEOUT = 120_000  # milliseconds; the machine may be busy
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium():
    """Runs the system's Chromium, or that of the variable CHROMIUM; fails the test without one."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if path is None:
        pytest.fail("no Chromium: apt-get install chromium, or CHROMIUM=/path/to/it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=_FLAGS, timeout=_TIMEOUT)
        try:
            yield browser
        finally:
            browser.close()


class Opened:
    """A file opened from disk, with the errors and requests of its page."""

    def __init__(self, browser, path, *, dark=False, width=1280, height=900, touch=False):
        self.errors, self.requests = [], []
        self._context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce",
            has_touch=touch,
        )
        self.page = self._context.new_page()
        self.page.set_default_timeout(_TIMEOUT)
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]")

    def draw_all(self):
        """Scrolls through the page so that every chart is drawn."""
        for chart in self.page.locator(".chart").all():
            chart.scroll_into_view_if_needed()
            chart.locator(".plot-container").wait_for()

    def close(self):
        self._context.close()
