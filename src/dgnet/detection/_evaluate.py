"""Average precision and connectivity statistics of a trained detector."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dgnet._cost import CostModel
from dgnet.data import EvaluationLoader
from dgnet.detection._average_precision import CocoEvaluation, DetectionMeter, DetectionResult
from dgnet.detection._batching import collate
from dgnet.detection._coco import CocoDetection
from dgnet.evaluation import Batch, Meter, WiringStatistics, executed_by_image, executed_figures, find_ranks, gather, run_pass
from dgnet.graph import find_stages
from dgnet.inference import set_mode


@dataclass(frozen=True)
class DetectorEvaluation:
    """A detector's figures over a data set."""

    precision: DetectionResult
    connectivity: dict[str, Any]  # closed_edges, skippable_nodes, …: see `Evaluation`; empty for a static backbone
    results: list[dict[str, Any]]  # in COCO's format
    executed: dict[str, Any] = field(default_factory=dict)  # multiply-adds of the backbone: see `executed_figures`


def evaluate_detector(
    detector: nn.Module,
    dataset: CocoDetection,
    batch_size: int = 1,
    workers: int = 0,
    device: str = "cpu",
    mode: str = "dense",
    backend: str = "pycocotools",
    costs: CostModel | None = None,
) -> DetectorEvaluation:
    """Run a detector over a data set.

    In a group of processes the images are divided among them, and all processes return the same figures.

    `mode`: "dense" or "sparse", see `set_mode`. `backend`: see `evaluate_results`. `costs`: of the backbone, to count the
    multiply-adds that each image executes.

    Raises UsageError for a size or count out of range, and for the sparse mode with a static backbone.
    """
    rank, ranks = find_ranks()
    loader = EvaluationLoader(dataset, batch_size, workers, collate, rank, ranks)
    evaluation = CocoEvaluation(dataset.annotations, backend)
    detector = set_mode(detector.to(device).eval(), mode)
    stages = find_stages(detector)
    wiring = WiringStatistics(stages)
    meters: list[Meter] = [DetectionMeter(evaluation), *([wiring] if stages else [])]
    cost = None if costs is None else _BackboneCost(costs)
    run_pass(detector, loader, meters if cost is None else [*meters, cost], device=device, desc="detect")
    results = evaluation.results()
    executed = {} if cost is None else cost.summary()
    return DetectorEvaluation(evaluation.compute(results), wiring.summary() if stages else {}, results, executed)


class _BackboneCost:
    """Executed multiply-adds of the backbone, for each image that has an id."""

    needs_connectivity = True

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.executed: list[Tensor] = []

    def update(self, batch: Batch) -> None:
        """Add a batch whose targets are a list of `Target`."""
        counts = torch.tensor([target["image_id"] is not None for target in batch.targets])
        self.executed.append(executed_by_image(self.costs, batch)[counts])

    def summary(self) -> dict[str, Any]:
        """The figures of `executed_figures`. All processes must call it."""
        return executed_figures(self.costs, torch.cat([chunk for chunks in gather(self.executed) for chunk in chunks]))
