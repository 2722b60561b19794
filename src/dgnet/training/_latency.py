"""The latency of the modules of an InstaNAS network: measured once, before the run begins, and kept in latency.json."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dgnet.documents import read_json
from dgnet.errors import UsageError
from dgnet.files import replace_file, to_json, writing
from dgnet.inference import fold_batch_norms, time_alternating
from dgnet.models import MODULES, InstaNAS, find_channels
from dgnet.paths import is_file
from dgnet.typed import read_entry

LATENCY = "latency.json"
"""The name of the table in a run folder."""

_ROUNDS, _ROUND_SECONDS = 5, 0.01


def measure_latencies(network: InstaNAS, image_size: tuple[int, int], device: str) -> Tensor:
    """Milliseconds of each module on one image, (L, M), on the CPU: medians over alternating rounds.

    Normalisations are folded, as in a deployed network. `image_size`: height and width in pixels.
    """
    deployed = fold_batch_norms(network, image_size).to(device).requires_grad_(False)
    assert isinstance(deployed, InstaNAS)
    features: list[Tensor] = []
    hooks = [cell.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0])) for cell in deployed.cells]
    with torch.inference_mode():
        deployed(torch.zeros(1, find_channels(network), *image_size, device=device))
        for hook in hooks:
            hook.remove()
        names = list(MODULES)
        steps: dict[str, Any] = {}
        for number, (cell, feature) in enumerate(zip(deployed.cells, features, strict=True)):
            for name, module in zip(names, cell.nodes, strict=False):  # the identity comes last
                steps[f"{number} {name}"] = partial(_call, module, torch.randn_like(feature))
        seconds = time_alternating(steps, _ROUNDS, device, _ROUND_SECONDS)
    medians = [
        [round(1000 * statistics.median(seconds[f"{number} {name}"]), 6) for name in names] for number in range(len(features))
    ]
    return torch.tensor(medians, device="cpu")


def _call(module: nn.Module, feature: Tensor) -> Any:
    return module(feature)


@dataclass(frozen=True)
class LatencyTable:
    """latency.json in the run folder `folder`. `about`: what was measured, and where."""

    folder: Path
    about: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / LATENCY

    def write(self, latency: Tensor) -> None:
        """Write the table, unless it is there. `latency`: milliseconds of each module, (L, M)."""
        if is_file(self.path):
            return
        cells = [{name: round(value, 6) for name, value in zip(MODULES, row, strict=True)} for row in latency.tolist()]
        document = {**self.about, "unit": "milliseconds", "cells": cells}
        with writing(f"the run folder {self.folder}"), replace_file(self.path) as written:
            written.write_text(to_json(document, indent=2) + "\n", encoding="utf-8")


def read_latencies(path: Path, cells: int) -> Tensor:
    """The milliseconds of each module, (L, M), from a file that `LatencyTable` wrote.

    Raises UsageError for another file, another number of cells, and values that are no latencies.
    """
    document = read_json(path)
    rows = read_entry(document, "cells", list[dict[str, float]], str(path))
    if len(rows) != cells or any(row.keys() != MODULES.keys() for row in rows):
        raise UsageError(f"{path} has {len(rows)} cells, and the network {cells} with the modules {', '.join(MODULES)}")
    latency = torch.tensor([[row[name] for name in MODULES] for row in rows], device="cpu")
    if not (latency > 0).all() or not latency.isfinite().all():
        raise UsageError(f"{path} holds a latency that is not above 0")
    return latency
