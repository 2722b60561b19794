"""The browser that opens a page, and what goes wrong on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def open_browser() -> Iterator[Any]:
    """Headless Chromium under Playwright; skips the test, with the reason, where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="drives a browser with the playwright package")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # As root, as in a container, Chromium has no sandbox.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def watch(page: Any, allowed: tuple[str, ...] = ("file://", "data:", "blob:")) -> list[str]:
    """What goes wrong on a page: console messages of errors, exceptions, dialogs, requests to elsewhere."""
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith(allowed) else wrong.append(request.url))
    return wrong
