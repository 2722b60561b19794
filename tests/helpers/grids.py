"""Grids that tests write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

MODELS = {"static": "resnet20", "dynamic": "dg_resnet20"}
RECIPE = {"batch_size": 4, "image_size": 8, "lr": 0.05, "model_kwargs": {"channels": [4, 4, 4]}}
ONE_TRAINING = {"usual": {"model": "dg_resnet20"}, "raw": {"model": "dg_resnet20", "evaluate": {"inference_weight": "raw"}}}
CHAIN = {
    "base": {"model": "resnet20"},
    "tuned": {"model": "resnet20", "weights": "$run:base"},
    "student": {"model": "resnet20", "teacher": "$run:tuned"},
}
"""Arms of which each begins with the result of the one before."""
GRID: dict[str, Any] = {
    "recipe": "recipe.yaml",
    "data": "train-{000000..000000}.tar",
    "test": "test.tar",
    "options": {"epochs": 2, "evaluate_every": 2, "cache": True},
    "groups": {"a": {"seeds": [3, 4], "arms": {arm: {"model": model} for arm, model in MODELS.items()}}},
    "compare": [["static", "dynamic"]],
}


def write_yaml(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_grid(folder: Path, name: str = "grid.yaml", **changes: object) -> Path:
    """The grid with other keys; one whose value is ... is left out."""
    return write_yaml(folder / name, {key: value for key, value in {**GRID, **changes}.items() if value is not ...})


def one_group(arms: object, seeds: object = (3,)) -> dict[str, Any]:
    """The keys of a grid with one group and no comparison."""
    return {"groups": {"a": {"seeds": list(seeds), "arms": arms}}, "compare": []}  # type: ignore[call-overload]
