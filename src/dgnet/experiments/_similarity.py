"""Cosine similarity of the inputs of a stage's nodes, at initialisation and after training.

If all nodes read nearly the same sum, the stage acts like one wide layer; if their inputs differ, it has depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.checkpoint import load_checkpoint
from dgnet.errors import UsageError, check_range
from dgnet.evaluation import open_evaluation_data
from dgnet.experiments._report import format_table
from dgnet.graph import find_stages


def format_similarity(rows: Sequence[Sequence[str]]) -> str:
    """The rows of `compare_inputs` as a Markdown table."""
    heads = ["run", "stage", "next node, start", "trained", "any two nodes, start", "trained"]
    return format_table(heads, [list(row) for row in rows])


def compare_inputs(run: Path, source: str | None, images: int) -> list[list[str]]:
    """One row for each stage of a run's network. `source`: by default the images that the run was evaluated on.

    `images`: how many, the first ones. Raises UsageError for a static network, and for fewer than two images.
    """
    check_range("--images", images, 2)
    checkpoint = load_checkpoint(run)
    network: Any = checkpoint.build_network()
    if not find_stages(network):
        raise UsageError(f"{run}: {checkpoint.model} has no dynamic stages")
    data = open_evaluation_data(checkpoint, source)
    batch = torch.stack([data[index][0] for index in range(min(images, len(data)))])
    trained = similarity(network.eval(), batch)
    torch.manual_seed(0)
    network.init_weights()
    start = similarity(network.train(), batch)  # normalisation with the batch's statistics
    return [
        [run.name, str(stage), *(f"{value:.2f}" for pair in zip(before, after, strict=True) for value in pair)]
        for stage, (before, after) in enumerate(zip(start, trained, strict=True), start=1)
    ]


@torch.no_grad()
def similarity(network: nn.Module, images: Tensor) -> list[tuple[float, float]]:
    """For each stage the mean cosine similarity of the inputs of a node and the next one, and of any two nodes.

    Means are over `images`, (B, 3, H, W), and over the pairs of nodes whose inputs have the same shape; NaN without such pairs.
    """
    found = []
    read: dict[int, Tensor] = {}

    def note(index: int, inputs: tuple[Tensor, ...]) -> None:
        read[index] = inputs[0].flatten(1)

    def sum_up(*_: object) -> None:
        pairs = {
            (one, other): F.cosine_similarity(read[one], read[other]).mean().item()
            for one, other in combinations(sorted(read), 2)
            if read[one].shape == read[other].shape
        }
        consecutive = [value for (one, other), value in pairs.items() if other == one + 1]
        found.append((fmean(consecutive), fmean(pairs.values())) if consecutive else (float("nan"),) * 2)
        read.clear()

    hooks = []
    for stage in find_stages(network):
        for index, node in enumerate(stage.nodes):
            hooks.append(node.register_forward_pre_hook(lambda _, inputs, index=index: note(index, inputs)))
        hooks.append(stage.register_forward_hook(sum_up))
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found
