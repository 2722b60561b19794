"""Images to train on, and a run, for the tests of commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from dgnet.cli import main
from tests.helpers.command import QUICK
from tests.helpers.data import jpeg


@pytest.fixture(scope="package")
def images(tmp_path_factory) -> Path:
    """A divided folder of two classes, dark and light."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 3)):
        for name, colour in (("dark", 0), ("light", 200)):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                (root / split / name / f"{index}.jpg").write_bytes(jpeg(colour + 5 * index))
    return root


@pytest.fixture(scope="package")
def run(images, tmp_path_factory) -> Path:
    """A run of two epochs on `images`. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", "--data", str(images), "--epochs", "2", "--output", str(folder), *QUICK]) == 0
    return folder
