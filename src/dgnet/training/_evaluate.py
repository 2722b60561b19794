"""Accuracy of a network, and how its connectivity behaved, over a data set."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics import MetricCollection
from tqdm import tqdm

from dgnet._cost import CostModel, cost_model
from dgnet.checkpoint import Checkpoint
from dgnet.data import EVALUATION, TRAIN, BadImages, ImageDataset, hold_out, open_dataset
from dgnet.errors import check_range
from dgnet.graph import DynamicGraph, Record, Topology, find_stages, record_connectivity, require_stages, use_connectivity
from dgnet.inference import measure_speed, set_mode
from dgnet.training._metrics import build_metrics, update_metrics


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
    weight_std: float  # spread of an edge's weight over the images, mean over the edges that the weighting weighs
    dense_multiply_adds: int  # of one image with every edge open: convolutions, routers and aggregation
    executed_multiply_adds: float  # of an image, mean: of the nodes that ran and the edges that were open
    executed_std: float
    executed_percentiles: dict[str, float]  # the 5th, 25th, 50th, 75th and 95th
    executed_by_class: dict[str, float]  # mean over the images of each class; a class without images is left out
    images_per_second: dict[str, float] | None = None  # of static, dense and sparse, measured in one run
    top1_mean_adjacency: float | None = None  # percent, with every image given the mean of all images' weights
    top1_other_adjacency: float | None = None  # percent, with every image given another image's weights


class ExecutedCost:
    """Multiply-adds that each image executed, one number an image and class."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.executed: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, labels: Tensor, record: Record | None) -> None:
        """`record`: of the images' forward; None for a static network."""
        if record is None:
            executed = torch.full((len(labels),), float(self.costs.dense), dtype=torch.float64)
        else:
            executed = self.costs.executed_in(record)
        self.executed.append(executed)
        self.labels.append(labels.cpu())

    def summary(self, class_names: list[str]) -> dict[str, Any]:
        """The cost figures of `Evaluation`."""
        executed, labels = torch.cat(self.executed), torch.cat(self.labels)
        shares = (5, 25, 50, 75, 95)
        named = Counter(class_names)
        percentiles = np.percentile(executed.numpy(), shares)
        return {
            "dense_multiply_adds": self.costs.dense,
            "executed_multiply_adds": float(executed.mean()),
            "executed_std": float(executed.std(correction=0)),
            "executed_percentiles": {str(share): float(value) for share, value in zip(shares, percentiles, strict=True)},
            "executed_by_class": {
                # Names may repeat: ImageNet has two kinds of crane.
                name if named[name] == 1 else f"{name} ({index})": float(executed[labels == index].mean())
                for index, name in enumerate(class_names)
                if (labels == index).any()
            },
        }


class WiringStatistics:
    """Weights, open and closed edges, accumulated over batches in float64.

    Memory grows with the number of wirings only; `most_wirings` bounds it: others are not told apart any more.
    """

    def __init__(self, stages: list[DynamicGraph], most_wirings: int | None = None) -> None:
        self.most_wirings = most_wirings
        self.masks = [stage.topology.mask for stage in stages]
        self.sums = [torch.zeros(mask.shape, dtype=torch.float64) for mask in self.masks]
        self.squares = [torch.zeros(mask.shape, dtype=torch.float64) for mask in self.masks]
        self.opens = [torch.zeros(mask.shape, dtype=torch.int64) for mask in self.masks]
        # Moments are taken about the first image: weights that do not differ have a spread of 0, not of a rounding.
        self.first: list[Tensor] = []
        self.weighed = [_weighed_edges(stage.topology) for stage in stages]
        self.images = self.dead = self.empty = 0
        self.wirings: Counter[bytes] = Counter()

    def update(self, adjacency: list[Tensor]) -> None:
        """`adjacency`: for each stage the weights as aggregated, (B, N, N)."""
        self.images += len(adjacency[0])
        patterns = []
        adjacency = [matrix.cpu().double() for matrix in adjacency]
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
            if self.most_wirings is None or len(self.wirings) < self.most_wirings or pattern in self.wirings:
                self.wirings[pattern] += 1

    def mean(self) -> list[Tensor]:
        """For each stage the mean weight of every edge, (N, N), 0 where an edge is closed counted in."""
        return [first + total / self.images for first, total in zip(self.first, self.sums, strict=True)]

    def std(self) -> list[Tensor]:
        """For each stage the standard deviation of every edge's weight over the images, (N, N)."""
        pairs = zip(self.sums, self.squares, strict=True)
        return [(square / self.images - (total / self.images) ** 2).clamp(min=0).sqrt() for total, square in pairs]

    def open_share(self) -> list[Tensor]:
        """For each stage the share of images for which every edge is open, (N, N)."""
        return [opened / self.images for opened in self.opens]

    def summary(self) -> dict[str, Any]:
        """The connectivity figures of `Evaluation`."""
        closed = sum(int((self.images - opened[mask]).sum()) for opened, mask in zip(self.opens, self.masks, strict=True))
        edges = sum(int(mask.sum()) for mask in self.masks)
        nodes = sum(len(mask) - 2 for mask in self.masks)
        spread = torch.cat([std[mask] for std, mask in zip(self.std(), self.weighed, strict=True)])
        return {
            "closed_edges": closed / (edges * self.images),
            "skippable_nodes": self.dead / (nodes * self.images),
            "distinct_wirings": len(self.wirings),
            "empty_outputs": self.empty,
            "weight_std": float(spread.mean()) if len(spread) else 0.0,
        }


class Tally:
    """Accuracy, connectivity and executed cost of a network, accumulated over batches."""

    def __init__(self, network: nn.Module, class_names: list[str], costs: CostModel, device: str) -> None:
        self.network = network
        self.class_names = class_names
        self.stages = find_stages(network)
        self.metrics = build_metrics().to(device)
        self.statistics = WiringStatistics(self.stages)
        self.cost = ExecutedCost(costs)
        self.images = 0

    def update(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Run the network on a batch; returns the adjacency of each stage, (B, N, N), none for a static network."""
        self.images += len(labels)
        if not self.stages:
            update_metrics(self.metrics, self.network(images), labels)
            self.cost.update(labels, None)
            return []
        with record_connectivity(self.network) as record:
            update_metrics(self.metrics, self.network(images), labels)
        adjacency = record.adjacency
        self.statistics.update(adjacency)
        self.cost.update(labels, record)
        return adjacency

    def evaluation(self, **more: Any) -> Evaluation:
        """The figures; `more`: fields that were measured apart."""
        return Evaluation(
            top1=percent(self.metrics, "top1", self.images),
            top5=percent(self.metrics, "top5", self.images),
            loss=float(self.metrics["loss"].compute()),
            images=self.images,
            **(self.statistics.summary() if self.stages else _STATIC_WIRING),
            **self.cost.summary(self.class_names),
            **more,
        )


def percent(metrics: MetricCollection, name: str, images: int) -> float:
    """An accuracy in percent, exactly: the metrics are float32, an accuracy is a count of images."""
    return 100 * round(float(metrics[name].compute()) * images) / images


def _weighed_edges(topology: Topology) -> Tensor:
    """(N, N): the edges that the weighting weighs, all but the pinned ones."""
    weighed = topology.mask.clone()
    weighed[list(topology.pinned)] = False
    return weighed


def describe_source(checkpoint: Checkpoint, source: str | None) -> str:
    """The images that a checkpoint is evaluated on, in words: `source`, or what its run was evaluated on."""
    config = checkpoint.config
    if source is None and config.get("holdout"):
        return f"{config['holdout']} held-out images of {config['data']}"
    return str(source or config.get("val_data") or config["data"])


def open_evaluation_data(
    checkpoint: Checkpoint, source: str | None = None, data_root: str | None = None, needs_labels: bool = True
) -> ImageDataset:
    """`source`, by default what the checkpoint's run was evaluated on, with the checkpoint's preprocessing.

    `needs_labels`: see `dgnet.data.open_dataset`.

    Images that the run skipped, as its `--on-bad-image skip` had asked for, are left out, and a line on stderr says so.

    Raises UsageError for a source that is not there or has classes unknown to it.
    """
    config = checkpoint.config
    root = data_root or config.get("data_root", "data")
    if source is None and config.get("holdout"):
        whole = open_dataset(config["data"], TRAIN, checkpoint.class_names, root)
        dataset: ImageDataset = hold_out(whole, config["holdout"])[1]
    else:
        source = source or config.get("val_data") or config["data"]
        dataset = open_dataset(source, EVALUATION, checkpoint.class_names, root, needs_labels)
    if config.get("on_bad_image") == "skip":
        dataset = _leave_out_bad(dataset, checkpoint.path)
    dataset.transform = checkpoint.preprocessing.evaluation_transform()
    return dataset


def _leave_out_bad(dataset: ImageDataset, path: Path) -> ImageDataset:
    """Without what the run that wrote the checkpoint `path` skipped."""
    whole = len(dataset)
    for folder in (path.parent, path.parent.parent):
        listed = folder / "bad_images.txt"
        dataset = BadImages(listed, limit=0).leave_out(dataset)
        if len(dataset) < whole:
            print(f"{whole - len(dataset)} of {whole:,} images are left out: {listed} says why", file=sys.stderr)
            break
    return dataset


@torch.no_grad()
def evaluate(
    network: nn.Module,
    dataset: ImageDataset,
    batch_size: int = 128,
    workers: int = 0,
    device: str = "cpu",
    adjacency_controls: bool = False,
    mode: str = "dense",
    static: nn.Module | None = None,
    speed: bool = False,
    compile: bool = False,
) -> Evaluation:
    """Evaluate `network` on `dataset`, whose transform is set; the network is left on `device`, in evaluation mode.

    A static network has one wiring and closes nothing. `mode`: "dense" or "sparse", see `dgnet.inference.set_mode`.
    `adjacency_controls`: evaluate twice more, with every image given the mean of all images' weights, and with every image
    given another's, drawn at random: what connectivity that follows the image is worth. `speed`: measure images/s of the
    network's modes, and of `static` beside them, on the first batch; see `dgnet.inference.measure_speed`, also for `compile`.

    Raises UsageError for a size or count that makes no sense, and for controls of a network without dynamic stages.
    """
    check_range("--batch-size", batch_size, 1)
    check_range("--workers", workers, 0)
    network = network.to(device).eval()
    set_mode(network, mode)
    if adjacency_controls:
        require_stages(network)
        # Neighbours in a data set are often of one class.
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    other, mean = (build_metrics().to(device) for _ in range(2))
    shown = Subset(dataset, order) if adjacency_controls else dataset
    loader: DataLoader[Any] = DataLoader(shown, batch_size=batch_size, num_workers=workers)
    previous: list[Tensor] = []  # the image before a batch
    tally: Tally | None = None
    more: dict[str, Any] = {}
    for images, labels in tqdm(loader, desc="evaluate", unit="batch"):
        images, labels = images.to(device), labels.to(device)
        if tally is None:
            tally = Tally(network, dataset.class_names, cost_model(network, tuple(images.shape[2:])), device)
            if speed:
                more["images_per_second"] = measure_speed(network, images, static, compile)
        adjacency = tally.update(images, labels)
        if adjacency_controls:
            before = previous or [matrix[-1:] for matrix in adjacency]
            shifted = [torch.cat([first, matrix[:-1]]) for first, matrix in zip(before, adjacency, strict=True)]
            previous = [matrix[-1:] for matrix in adjacency]
            with use_connectivity(network, shifted):
                update_metrics(other, network(images), labels)
    assert tally is not None
    if adjacency_controls:
        with use_connectivity(network, [matrix.float() for matrix in tally.statistics.mean()]):
            for images, labels in tqdm(loader, desc="evaluate with the mean adjacency", unit="batch"):
                update_metrics(mean, network(images.to(device)), labels.to(device))
        more |= {f"top1_{name}_adjacency": percent(of, "top1", len(dataset)) for name, of in (("mean", mean), ("other", other))}
    return tally.evaluation(**more)


_STATIC_WIRING = {"closed_edges": 0.0, "skippable_nodes": 0.0, "distinct_wirings": 1, "empty_outputs": 0, "weight_std": 0.0}
