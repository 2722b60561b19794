"""Images to train on, for runs that are interrupted and go on."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.data import write_shard


@pytest.fixture(scope="package")
def data(tmp_path_factory) -> Path:
    """26 training images of two classes, as a folder and as two shards; 7 to evaluate on."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 26), ("val", 7)):
        samples = []
        for index in range(count):
            content, label = noise(index + 150 * (index % 2)), index % 2
            folder = root / split / ("dark", "light")[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index}.png").write_bytes(content)
            samples.append({"png": content, "cls": str(label).encode()})
        for shard in range(2):
            write_shard(root / f"{split}-{shard}.tar", samples[shard::2])
    return root


def noise(least: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(least).integers(least, least + 70, (9, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
