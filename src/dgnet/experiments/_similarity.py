"""What training changes in a stage: how similar the inputs of its nodes are, its edges (`_edges.py`), and what their weights
depend on (`_signal.py`).

If all nodes read nearly the same sum, the stage acts like one wide layer; if their inputs differ, it has depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgnet.checkpoint import Checkpoint, load_checkpoint
from dgnet.errors import UsageError, check_range
from dgnet.evaluation import open_evaluation_data
from dgnet.experiments._edges import compare_edges, format_edges
from dgnet.experiments._report import format_table
from dgnet.experiments._signal import compare_signal, format_signal
from dgnet.graph import find_stages
from dgnet.options import flag


def format_similarity(rows: Sequence[Sequence[str]]) -> str:
    """The rows of `compare_inputs` as a Markdown table."""
    heads = ["run", "stage", "next node, start", "trained", "any two nodes, start", "trained"]
    return format_table(heads, [list(row) for row in rows])


class Comparison(NamedTuple):
    """Rows about a network before and after training: those of `compare_inputs`, `compare_edges` and `compare_signal`."""

    inputs: list[list[str]]
    edges: list[list[str]]
    signal: list[list[str]]


def format_comparisons(comparisons: Sequence[Comparison]) -> str:
    """Three Markdown tables of several networks."""
    formats = (format_similarity, format_edges, format_signal)
    tables = zip(formats, zip(*comparisons, strict=True), strict=True)
    return "\n\n".join(format_rows([row for rows in parts for row in rows]) for format_rows, parts in tables)


def compare_with_start(run: Path, source: str | None, images: int) -> Comparison:
    """Compare a run's network before training with that after it.

    `source`: by default the images that the run was evaluated on. `images`: how many, the first ones. The start is drawn anew.
    Raises UsageError for a static network, for a run that began with trained weights, and for fewer than two images.
    """
    check_range("--images", images, 2)
    checkpoint = load_checkpoint(run)
    network: Any = checkpoint.build_network()
    if not find_stages(network):
        raise UsageError(f"{run}: {checkpoint.model} has no dynamic stages")
    data = open_evaluation_data(checkpoint, source)
    items = [data[index] for index in range(min(images, len(data)))]
    batch, labels = torch.stack([item[0] for item in items]), torch.tensor([item[1] for item in items])
    start = draw_start(run, checkpoint)
    set_statistics(start, batch)
    network.eval()
    return Comparison(
        compare_inputs(run.name, start, network, batch),
        compare_edges(run.name, start, network, batch, labels),
        compare_signal(run.name, start, network, batch, labels),
    )


def draw_start(run: Path, checkpoint: Checkpoint) -> nn.Module:
    """The network of a run as before training, under the seed 0: built anew, as not every class can initialise its weights.

    Raises UsageError if the run began with trained weights: a start that is drawn would not be its own.
    """
    given = [flag(name) for name in ("weights", "pretrained") if checkpoint.config.get(name)]
    if given:
        raise UsageError(
            f"{run} began with trained weights ({given[0]}), so its start cannot be drawn; name runs that began untrained"
        )
    torch.manual_seed(0)
    return checkpoint.create_network(num_classes=len(checkpoint.class_names), **checkpoint.preprocessing.network_options)


def compare_inputs(name: str, start: nn.Module, trained: nn.Module, images: Tensor) -> list[list[str]]:
    """One row for each stage: the figures of `similarity` of the network before and after training."""
    pairs = zip(similarity(start, images), similarity(trained, images), strict=True)
    return [
        [name, str(stage), *(f"{value:.2f}" for pair in zip(before, after, strict=True) for value in pair)]
        for stage, (before, after) in enumerate(pairs, start=1)
    ]


@torch.no_grad()
def set_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the statistics of batch normalisations to those of `images`, and the network to evaluation mode."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    network.eval()


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
