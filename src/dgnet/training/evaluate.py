"""Accuracy of a network, and how its connectivity behaved, over a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dgnet.checkpoint import Checkpoint
from dgnet.data import EVALUATION, ImageDataset, open_dataset
from dgnet.errors import check_range
from dgnet.graph import DynamicGraph, Record, record_connectivity
from dgnet.training.metrics import build_metrics, update_metrics


@dataclass(frozen=True)
class Evaluation:
    """Figures over all images of a data set; shares lie in 0 to 1."""

    top1: float  # percent
    top5: float  # percent
    loss: float  # mean cross-entropy
    images: int
    closed_edges: float  # share of edges × images
    skippable_nodes: float  # share of block nodes × images without an open in-edge
    distinct_wirings: int  # patterns of open edges, over all stages at once
    empty_outputs: int  # output nodes × images without an open in-edge


class WiringStatistics:
    """Open and closed edges, accumulated over batches in memory that grows with the number of wirings only."""

    def __init__(self, stages: list[DynamicGraph]) -> None:
        self.masks = [stage.topology.mask for stage in stages]
        self.images = self.closed = self.dead = self.empty = 0
        self.wirings: set[bytes] = set()

    def update(self, adjacency: list[Tensor]) -> None:
        """`adjacency`: for each stage the weights as aggregated, (B, N, N)."""
        self.images += len(adjacency[0])
        patterns = []
        for mask, matrix in zip(self.masks, adjacency, strict=True):
            is_open = matrix.cpu() != 0
            patterns.append(is_open[:, mask])
            has_input = is_open.any(2)
            self.closed += int((~is_open[:, mask]).sum())
            self.dead += int((~has_input[:, 1:-1]).sum())
            self.empty += int((~has_input[:, -1]).sum())
        self.wirings.update(row.tobytes() for row in torch.cat(patterns, dim=1).numpy())

    def summary(self) -> dict[str, Any]:
        """The connectivity figures of `Evaluation`."""
        edges = sum(int(mask.sum()) for mask in self.masks)
        nodes = sum(len(mask) - 2 for mask in self.masks)
        return {
            "closed_edges": self.closed / (edges * self.images),
            "skippable_nodes": self.dead / (nodes * self.images),
            "distinct_wirings": len(self.wirings),
            "empty_outputs": self.empty,
        }


def evaluation_source(checkpoint: Checkpoint) -> str:
    """What the checkpoint's run was evaluated on."""
    source: str = checkpoint.config.get("val_data") or checkpoint.config["data"]
    return source


def evaluate_checkpoint(
    checkpoint: Checkpoint, source: str | None = None, data_root: str | None = None, **options: Any
) -> Evaluation:
    """Evaluate a checkpoint on `source`, by default on what its run was evaluated on, with its own preprocessing.

    `options`: those of `evaluate`. Raises UsageError for a source that is not there or has classes unknown to it.
    """
    root = data_root or checkpoint.config.get("data_root", "data")
    dataset = open_dataset(source or evaluation_source(checkpoint), EVALUATION, checkpoint.class_names, root)
    dataset.transform = checkpoint.preprocessing.evaluation_transform()
    return evaluate(checkpoint.build_network(), dataset, **options)


@torch.no_grad()
def evaluate(
    network: nn.Module, dataset: ImageDataset, batch_size: int = 128, workers: int = 0, device: str = "cpu"
) -> Evaluation:
    """Evaluate `network` on `dataset`, whose transform is set; the network is left on `device`, in evaluation mode.

    A static network has one wiring and closes nothing. Raises UsageError for a size or count that makes no sense.
    """
    check_range("--batch-size", batch_size, 1)
    check_range("--workers", workers, 0)
    network = network.to(device).eval()
    metrics = build_metrics(len(dataset.class_names)).to(device)
    stages = [module for module in network.modules() if isinstance(module, DynamicGraph)]
    statistics = WiringStatistics(stages)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    for images, labels in tqdm(loader, desc="evaluate", unit="batch"):
        images, labels = images.to(device), labels.to(device)
        if stages:
            record: Record
            with record_connectivity(network) as record:
                logits = network(images)
            statistics.update(record.adjacency)
        else:
            logits = network(images)
        update_metrics(metrics, logits, labels)
    values = {name: float(value) for name, value in metrics.compute().items()}
    wiring = (
        statistics.summary()
        if stages
        else {"closed_edges": 0.0, "skippable_nodes": 0.0, "distinct_wirings": 1, "empty_outputs": 0}
    )
    # The metrics are float32; an accuracy is a count of images.
    top1, top5 = (100 * round(values[name] * len(dataset)) / len(dataset) for name in ("top1", "top5"))
    return Evaluation(top1, top5, values["loss"], len(dataset), **wiring)
