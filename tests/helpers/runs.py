"""Options of runs with all kinds of random numbers, and a comparison of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dgnet.files import read_table


def options(data: Path, output: Path, source: str = "folder", **more: Any) -> dict[str, Any]:
    """Options of a run of 24 steps with random augmentation and dropout."""
    sources = {
        "folder": {"data": str(data)},
        "shards": {"data": f"{data}/train-{{0..1}}.tar", "val_data": f"{data}/val-{{0..1}}.tar"},
    }
    own = {
        "model_kwargs": {"channels": [4, 4, 4], "drop_rate": 0.5},
        "image_size": 8,
        "batch_size": 4,
        "epochs": 4,
        "lr": 0.05,
        "threads": 1,
        "accelerator": "cpu",
        "checkpoint_every": "1 step",
        "output": str(output),
    }
    return {**own, **sources[source], **more}


def curve(run: Path) -> list[tuple[int, float]]:
    """Step and value of each point of `val_loss` in TensorBoard's files."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("val_loss")]


def assert_same(run: Path, twin: Path, exact: bool = True) -> None:
    """Two runs have weights that are equal to the bit, and the same metrics.csv (up to rounding unless `exact`) and curves."""
    weights, expected = (load_file(folder / "model.safetensors") for folder in (run, twin))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    rows, expected_rows = (read_table(folder / "metrics.csv") for folder in (run, twin))
    assert len(rows) == len(expected_rows)
    for row, other in zip(rows, expected_rows, strict=True):
        values, others = ({name: float(value) for name, value in r.items() if value} for r in (row, other))
        assert values == (others if exact else pytest.approx(others, rel=1e-5))
    assert curve(run) == curve(twin)
