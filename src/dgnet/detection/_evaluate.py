"""Average precision and connectivity statistics of a trained detector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from dgnet.data import EvaluationLoader
from dgnet.detection._average_precision import CocoEvaluation, DetectionMeter, DetectionResult
from dgnet.detection._batching import collate
from dgnet.detection._coco import CocoDetection
from dgnet.evaluation import WiringStatistics, find_ranks, run_pass
from dgnet.graph import find_stages
from dgnet.inference import set_mode


@dataclass(frozen=True)
class DetectorEvaluation:
    """A detector's figures over a data set."""

    precision: DetectionResult
    connectivity: dict[str, Any]  # closed_edges, skippable_nodes, …: see `Evaluation`; empty for a static backbone
    results: list[dict[str, Any]]  # in COCO's format


def evaluate_detector(
    detector: nn.Module,
    dataset: CocoDetection,
    batch_size: int = 1,
    workers: int = 0,
    device: str = "cpu",
    mode: str = "dense",
    backend: str = "pycocotools",
) -> DetectorEvaluation:
    """Run a detector over a data set.

    In a group of processes the images are divided among them, and all processes return the same figures.

    `mode`: "dense" or "sparse", see `set_mode`. `backend`: see `evaluate_results`.

    Raises UsageError for a size or count out of range, and for the sparse mode with a static backbone.
    """
    rank, ranks = find_ranks()
    loader = EvaluationLoader(dataset, batch_size, workers, collate, rank, ranks)
    evaluation = CocoEvaluation(dataset.annotations, backend)
    detector = set_mode(detector.to(device).eval(), mode)
    stages = find_stages(detector)
    wiring = WiringStatistics(stages)
    run_pass(detector, loader, [DetectionMeter(evaluation), *([wiring] if stages else [])], device=device, desc="detect")
    results = evaluation.results()
    return DetectorEvaluation(evaluation.compute(results), wiring.summary() if stages else {}, results)
