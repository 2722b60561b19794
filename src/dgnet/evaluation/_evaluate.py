"""Accuracy, executed cost and connectivity statistics of a classifier over a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from dgnet._cost import CostModel, cost_model
from dgnet.data import EvaluationLoader, ImageDataset
from dgnet.evaluation._accuracy import Accuracy
from dgnet.evaluation._controls import OtherAdjacency
from dgnet.evaluation._executed import ExecutedCost
from dgnet.evaluation._pass import Meter, Variant, find_image_size, run_pass
from dgnet.evaluation._ranks import find_ranks
from dgnet.evaluation._wiring import WiringStatistics
from dgnet.graph import find_stages, require_stages, use_connectivity
from dgnet.inference import measure_speed, set_mode, set_sparse


@dataclass(frozen=True)
class Evaluation:
    """Figures over all images of a data set. Shares are from 0 to 1."""

    top1: float  # percent
    top5: float  # percent
    loss: float  # mean cross-entropy
    images: int
    closed_edges: float  # share of edges × images
    skippable_nodes: float  # share of block nodes × images without an open in-edge
    distinct_wirings: int  # number of different patterns of open edges over all stages together
    empty_outputs: int  # output nodes × images without an open in-edge
    weight_std: float  # standard deviation of an edge's weight over the images; mean over all but the pinned edges
    dense_multiply_adds: int  # of one image with every edge open: all that `CostModel` counts
    executed_multiply_adds: float  # mean over the images; counts the nodes that ran and the edges that were open
    executed_std: float  # over the images
    executed_percentiles: dict[str, float]  # the 5th, 25th, 50th, 75th and 95th, over the images
    executed_by_class: dict[str, float]  # mean over the images of each class; a class without images is left out
    images_per_second: dict[str, float] | None = None  # of static, dense and sparse, measured in one run
    top1_mean_adjacency: float | None = None  # percent; every image runs with the mean of all images' weights
    top1_other_adjacency: float | None = None  # percent; every image runs with another image's weights


class EvaluationMeters:
    """The meters of an `Evaluation`. `costs`: the network's costs at the data set's image size."""

    def __init__(self, network: nn.Module, class_names: list[str], costs: CostModel) -> None:
        self.accuracy = Accuracy()
        self.wiring = WiringStatistics(find_stages(network))
        self.cost = ExecutedCost(costs, class_names)

    def __iter__(self) -> Iterator[Meter]:
        return iter((self.accuracy, self.wiring, self.cost))

    def evaluation(self, **more: Any) -> Evaluation:
        """The figures. `more`: fields that no meter measures. All processes must call it."""
        return Evaluation(**self.accuracy.summary(), **self.wiring.summary(), **self.cost.summary(), **more)  # type: ignore[arg-type]


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
    executor: str = "recommended",
) -> Evaluation:
    """Evaluate `network` on `dataset`, whose transform is set. The network stays on `device`, in evaluation mode.

    In a group of processes the images are divided among them, and all processes return the same figures. A static network has
    one wiring and no closed edges.

    `mode`: "dense" or "sparse", see `dgnet.inference.set_mode`. `executor`: for the sparse mode, see `set_sparse`.
    `adjacency_controls`: evaluate twice more, once with the mean of all images' weights for every image, and once with the
    weights of another, random image. They show what instance-aware connectivity is worth. `speed`: measure images/s of the
    network's modes, and of `static` if it is given, on the first batch. `compile`: see `dgnet.inference.measure_speed`.

    Raises UsageError for a size or count out of range, for an empty data set, and for `adjacency_controls` of a network without
    dynamic stages.
    """
    items: Any = dataset
    if adjacency_controls:
        require_stages(network)
        # Shuffled, because neighbours in a data set are often of one class.
        items = Subset(dataset, torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist())
    rank, ranks = find_ranks()
    loader = EvaluationLoader(items, batch_size, workers, rank=rank, ranks=ranks)
    network = network.to(device).eval()
    network = set_sparse(network, executor) if mode == "sparse" else set_mode(network, mode)
    meters = EvaluationMeters(network, dataset.class_names, cost_model(network, find_image_size(loader)))
    more: dict[str, Any] = {}
    if speed and rank == 0:
        more["images_per_second"] = measure_speed(network, loader.peek()[0].to(device), static, compile, executor=executor)
    if not adjacency_controls:
        run_pass(network, loader, list(meters), device=device)
        return meters.evaluation(**more)
    before, other, mean = OtherAdjacency(network), Accuracy(), Accuracy()
    run_pass(network, loader, [*meters, before], device=device, variants=[Variant([other], before.impose)])
    with use_connectivity(network, [matrix.float() for matrix in meters.wiring.gathered().mean()]):
        run_pass(network, loader, [mean], device=device, desc="evaluate with the mean adjacency")
    more |= {f"top1_{name}_adjacency": of.summary()["top1"] for name, of in (("mean", mean), ("other", other))}
    return meters.evaluation(**more)
