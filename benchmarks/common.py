"""What the benchmarks share: the networks, their stages' shapes, ratios of rounds, and files of rows."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dgnet._cost_tables import TABLES
from dgnet.graph import DynamicGraph, find_stages

MODELS = tuple(row.model for row in TABLES["1"].rows if not row.model.startswith("dg_"))
"""The static networks of Table 1; each has a `dg_` form."""


def stage_shapes(model: nn.Module, image_size: int) -> list[tuple[int, int, int, int]]:
    """(N, C, H, W) of each stage: number of nodes, and shape of its output maps. Moves the model to the meta device."""
    shapes = []

    def note(stage: DynamicGraph, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, channels, height, width = output.shape
        shapes.append((stage.topology.num_nodes, channels, height, width))

    model = model.to("meta").eval()
    for stage in find_stages(model):
        stage.register_forward_hook(note)  # type: ignore[arg-type]
    with torch.no_grad():
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return shapes


def ratios(one: list[float], other: list[float]) -> tuple[float, float, float]:
    """Median, minimum and maximum of one / other, taken round by round."""
    quotients = [a / b for a, b in zip(one, other, strict=True)]
    return statistics.median(quotients), min(quotients), max(quotients)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_rows` wrote to `path`; an empty list if the file does not exist."""
    rows: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return rows


def missing_rows(wanted: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The wanted rows that are not in `rows`. A row is found by the fields given in `wanted`."""
    return [row for row in wanted if not any(all(r[key] == value for key, value in row.items()) for r in rows)]


def measure_missing(
    wanted: list[dict[str, Any]], output: Path, minutes: float, measure: Callable[..., dict[str, Any] | None]
) -> list[dict[str, Any]]:
    """Measure the wanted rows that the file `output` lacks, and write each to it at once; returns all rows of the file.

    `measure`: called with the fields of a row, returns further ones, or None if it failed. After `minutes` no new row is
    started.
    """
    results, begun = read_rows(output), time.monotonic()
    missing = missing_rows(wanted, results)
    for number, row in enumerate(tqdm(missing, file=sys.stderr)):
        if time.monotonic() - begun > 60 * minutes:
            tqdm.write(f"{len(missing) - number} rows are left; run again to continue", sys.stderr)
            break
        measured = measure(**row)
        if measured is not None:
            results.append(row | measured)
            write_rows(output, results)
    return results


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a JSON list with one line per row."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
