"""A small grid and its images."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.data import jpeg, write_shard
from tests.helpers.grids import RECIPE, write_grid, write_yaml


@pytest.fixture
def folder(tmp_path) -> Path:
    """A grid of two arms with two seeds, and its data: dark and light images."""
    shard = [{"jpg": jpeg(200 * (i % 2) + i), "cls": str(i % 2).encode()} for i in range(12)]
    (tmp_path / "data").mkdir()
    write_shard(tmp_path / "data" / "train-000000.tar", shard)
    write_shard(tmp_path / "data" / "test.tar", shard[:6])
    write_yaml(tmp_path / "recipe.yaml", RECIPE)
    write_grid(tmp_path)
    return tmp_path
