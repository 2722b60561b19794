"""Small labelled pictures whose names are trouble for a page, and the browser that opens it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from PIL import Image
from torch import Tensor

from dgnet.data import ImageDataset, Preprocessing

CLASSES = ["cat", "catfish", '<b>"dog"</b>', "</script><script>owned = 1</script>", "fox 🦊 & co"]
NAMES = [
    "plain.jpg",
    "\"quoted\" and 'single'.jpg",
    "<img src=x onerror='owned = 1'>.jpg",
    "</script><script>owned = 1</script>.jpg",
    "🦊 &amp; <!-- .jpg",
    "half a character \udcff.jpg",
]


class Pictures(ImageDataset):
    """Pictures of 12×12 pixels, each of another colour; `labels` may hold None."""

    def __init__(self, labels: Sequence[int | None], class_names: Sequence[str] = CLASSES) -> None:
        self.labels = labels
        self.class_names = list(class_names)
        self.transform = Preprocessing((12, 12), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)).evaluation_transform()

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Any, Any]:
        picture = Image.new("RGB", (12, 12), (37 * index % 256, 91 * index % 256, 173 * index % 256))
        for pixel in range(index % 7 * 12):
            picture.putpixel((pixel % 12, pixel // 12), (255, 20 * index % 256, 0))
        return picture, self.labels[index]

    def name(self, index: int) -> str:
        return f"/home/somebody/photos/{index % 2}/{NAMES[index % len(NAMES)]}"

    def tensor(self, index: int) -> Tensor:
        """The picture as the network reads it, (1, 3, 12, 12)."""
        return self[index][0][None]


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
