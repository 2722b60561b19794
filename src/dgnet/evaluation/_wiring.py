"""Connectivity statistics over a data set.

Letters: B batch, N nodes of a stage, E edges of all stages.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgnet.evaluation._pass import Batch
from dgnet.evaluation._ranks import gather
from dgnet.graph import DynamicGraph, Topology


class WiringStatistics:
    """Statistics of edge weights and of open edges, accumulated over batches in float64.

    Memory grows only with the number of distinct wirings. `most_wirings` limits it: after that many, new wirings are not
    counted. A static network has no `stages`, one wiring and no closed edges.
    """

    needs_connectivity = True

    def __init__(self, stages: Sequence[DynamicGraph], most_wirings: int | None = None) -> None:
        self.most_wirings = most_wirings
        self.masks = [stage.topology.mask for stage in stages]
        self.sums = [torch.zeros(mask.shape, dtype=torch.float64) for mask in self.masks]
        self.squares = [torch.zeros(mask.shape, dtype=torch.float64) for mask in self.masks]
        self.opens = [torch.zeros(mask.shape, dtype=torch.int64) for mask in self.masks]
        # Moments are taken about the first image's weights, so that equal weights have a spread of exactly 0.
        self.first: list[Tensor] = []
        self.weighed = [_weighed_edges(stage.topology) for stage in stages]
        self.images = self.dead = self.empty = 0
        self.wirings: Counter[bytes] = Counter()

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        if not self.masks:
            return
        adjacency = [matrix.double() for matrix in batch.adjacency]
        self.images += len(adjacency[0])
        patterns = []
        self.first = self.first or [matrix[0] for matrix in adjacency]
        for stage, (mask, matrix) in enumerate(zip(self.masks, adjacency, strict=True)):
            distance = matrix - self.first[stage]
            self.sums[stage] += distance.sum(0)
            self.squares[stage] += distance.square().sum(0)
            is_open = matrix != 0
            self.opens[stage] += is_open.sum(0)
            patterns.append(is_open[:, mask])
            has_input = is_open.any(2)
            self.dead += int((~has_input[:, 1:-1]).sum())
            self.empty += int((~has_input[:, -1]).sum())
        for pattern in map(np.ndarray.tobytes, torch.cat(patterns, dim=1).numpy()):
            self._count(pattern, 1)

    def _count(self, pattern: bytes, images: int) -> None:
        if self.most_wirings is None or len(self.wirings) < self.most_wirings or pattern in self.wirings:
            self.wirings[pattern] += images

    def gathered(self) -> WiringStatistics:
        """The statistics of all processes together. All processes must call it."""
        whole, *others = [part for part in gather(self) if part.images] or [self]
        for other in others:
            whole._add(other)
        return whole

    def _add(self, other: WiringStatistics) -> None:
        for stage, first in enumerate(other.first):
            shift = first - self.first[stage]  # `other` takes its moments about `first`
            self.sums[stage] += other.sums[stage] + other.images * shift
            self.squares[stage] += other.squares[stage] + 2 * shift * other.sums[stage] + other.images * shift.square()
            self.opens[stage] += other.opens[stage]
        self.images += other.images
        self.dead += other.dead
        self.empty += other.empty
        for pattern, images in other.wirings.items():
            self._count(pattern, images)

    def mean(self) -> list[Tensor]:
        """For each stage the mean weight of every edge over the images, (N, N). A closed edge counts as 0."""
        return [first + total / self.images for first, total in zip(self.first, self.sums, strict=True)]

    def std(self) -> list[Tensor]:
        """For each stage the standard deviation of every edge's weight over the images, (N, N)."""
        pairs = zip(self.sums, self.squares, strict=True)
        return [(square / self.images - (total / self.images) ** 2).clamp(min=0).sqrt() for total, square in pairs]

    def open_share(self) -> list[Tensor]:
        """For each stage the share of images for which every edge is open, (N, N)."""
        return [opened / self.images for opened in self.opens]

    def summary(self) -> dict[str, Any]:
        """The connectivity figures of `Evaluation`. All processes must call it."""
        whole = self.gathered()
        if not whole.masks:
            return dict(_STATIC)
        closed = sum(int((whole.images - opened[mask]).sum()) for opened, mask in zip(whole.opens, whole.masks, strict=True))
        edges = sum(int(mask.sum()) for mask in whole.masks)
        nodes = sum(len(mask) - 2 for mask in whole.masks)
        spread = torch.cat([std[mask] for std, mask in zip(whole.std(), whole.weighed, strict=True)])
        return {
            "closed_edges": closed / (edges * whole.images),
            "skippable_nodes": whole.dead / (nodes * whole.images),
            "distinct_wirings": len(whole.wirings),
            "empty_outputs": whole.empty,
            "weight_std": float(spread.mean()) if len(spread) else 0.0,
        }


_STATIC = {"closed_edges": 0.0, "skippable_nodes": 0.0, "distinct_wirings": 1, "empty_outputs": 0, "weight_std": 0.0}


def _weighed_edges(topology: Topology) -> Tensor:
    """(N, N) bool: the edges whose weight the weighting decides, which are all but the pinned ones."""
    weighed = topology.mask.clone()
    weighed[list(topology.pinned)] = False
    return weighed


def flatten_edges(matrices: Sequence[Tensor], topologies: Sequence[Topology]) -> Tensor:
    """From (…, N, N) for each stage to (…, E): edges ordered by stage, then by receiver, then by sender."""
    pairs = zip(matrices, topologies, strict=True)
    return torch.cat([matrix[..., topology.mask.to(matrix.device)] for matrix, topology in pairs], dim=-1)


def edge_figures(stages: Sequence[DynamicGraph], adjacency: Sequence[Tensor]) -> dict[str, Tensor]:
    """For each stage and image, (B,): the mean weight of the stage's edges, and the share of them that is closed.

    `adjacency`: for each stage the weights as aggregated, (B, N, N).
    """
    figures = {}
    for name, stage, matrix in zip(edge_figure_names(stages), stages, adjacency, strict=True):
        weights = matrix[:, stage.topology.mask.to(matrix.device)]
        figures[name[0]] = weights.mean(1)
        figures[name[1]] = (weights == 0).float().mean(1)
    return figures


def edge_figure_names(stages: Sequence[DynamicGraph]) -> list[tuple[str, str]]:
    """The names of the figures in `edge_figures`, a pair for each stage."""
    return [(f"stage{number}_edge_weight", f"stage{number}_closed_edges") for number in range(1, len(stages) + 1)]
