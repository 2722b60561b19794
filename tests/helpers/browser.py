"""A browser for tests of pages, and a list of errors on a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def open_browser() -> Iterator[Any]:
    """Headless Chromium with Playwright. Skips the test, with the reason, if one of them is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package to drive a browser")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not work for root, for example in a container.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def watch(page: Any, allowed: tuple[str, ...] = ("file://", "data:", "blob:")) -> list[str]:
    """A list that collects what goes wrong on a page: console errors, exceptions, dialogs, requests outside `allowed`."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(allowed) else wrong.append(request.url))
    return wrong
