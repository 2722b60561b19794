"""Average precision of a trained detector, and how its connectivity behaved."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from dgnet.detection._average_precision import CocoEvaluation, DetectionResult
from dgnet.detection._batching import DetectionItems, collate
from dgnet.detection._coco import CocoDetection
from dgnet.detection._module import counted
from dgnet.errors import check_range
from dgnet.graph import find_stages, record_connectivity
from dgnet.inference import set_mode
from dgnet.training._evaluate import WiringStatistics
from dgnet.training._loading import EvaluationOrder, build_loader


@dataclass(frozen=True)
class DetectorEvaluation:
    """A detector's figures over a data set."""

    precision: DetectionResult
    connectivity: dict[str, Any]  # closed_edges, skippable_nodes, … of `Evaluation`; empty for a static backbone
    results: list[dict[str, Any]]  # in COCO's format


@torch.no_grad()
def evaluate_detector(
    detector: nn.Module,
    dataset: CocoDetection,
    batch_size: int = 1,
    workers: int = 0,
    device: str = "cpu",
    mode: str = "dense",
    backend: str = "pycocotools",
) -> DetectorEvaluation:
    """Run a detector over a data set; in a group of processes each takes its share, and all have the same figures.

    `mode`: "dense" or "sparse", see `set_mode`. The figures of connectivity are those of one process, and left out of a group.
    Raises UsageError for a sparse mode of a static backbone.
    """
    check_range("--batch-size", batch_size, 1)
    check_range("--workers", workers, 0)
    evaluation = CocoEvaluation(dataset.annotations, backend)
    stages = find_stages(detector)
    set_mode(detector, mode)
    ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    statistics = WiringStatistics(stages) if stages and ranks[1] == 1 else None
    loader = build_loader(DetectionItems(dataset), EvaluationOrder(len(dataset), batch_size, *ranks), workers, collate)
    detector = detector.to(device).eval()
    for images, targets in tqdm(loader, unit="batch", file=sys.stderr, mininterval=1, disable=ranks[0] > 0):
        with nullcontext() if statistics is None else record_connectivity(detector) as record:
            detections = detector([image.to(device) for image in images])
        if statistics is not None and record is not None:
            statistics.update(record.adjacency)
        evaluation.update(*counted(targets, detections))
    connectivity = {} if statistics is None else statistics.summary()
    results = evaluation.results()
    return DetectorEvaluation(evaluation.compute(results), connectivity, results)
