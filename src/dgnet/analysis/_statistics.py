"""Statistics of connectivity over a data set (§6.5): one pass, sums in float64, memory independent of the data set's size.

Letters: B batch, N nodes of a stage, E edges of all stages, K classes, S sampled images.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dgnet._cost import CostModel
from dgnet.data import IGNORED
from dgnet.evaluation import Batch, WiringStatistics, flatten_edges, image_figures
from dgnet.graph import Topology, find_stages

MOST_WIRINGS = 100_000
"""Most distinct wirings that are counted."""


@dataclass(frozen=True)
class Edge:
    """An edge of a network."""

    stage: int  # from 1
    sender: int  # 0 is the stage's input node
    receiver: int
    is_free: bool  # its weight comes from the weighting; False if the topology pins it


def list_edges(topologies: Sequence[Topology]) -> list[Edge]:
    """The edges by stage, receiver and sender: the order of `flatten_edges`."""
    return [
        Edge(stage, sender, receiver, receiver not in topology.pinned)
        for stage, topology in enumerate(topologies, start=1)
        for receiver in range(topology.num_nodes)
        for sender in topology.senders(receiver)
    ]


@dataclass(frozen=True)
class ImageResult:
    """The results of a network on one image."""

    index: int  # in the data set
    label: int | None  # None if it has no label
    prediction: int
    confidence: float  # probability of the prediction
    loss: float | None  # cross-entropy; None without a label
    executed: float  # multiply-adds
    adjacency: list[Tensor]  # for each stage the weights as used in the aggregation, (N, N), 0 where an edge is closed


class Extremes:
    """The `count` images with the smallest values, or the `largest`. Of equal values, the first ones are kept."""

    def __init__(self, count: int, largest: bool = False) -> None:
        self.count, self.largest = count, largest
        self._kept: list[tuple[float, ImageResult]] = []

    def update(self, values: Tensor, build: Callable[[int], ImageResult]) -> None:
        """Add a batch. `values`: (B,), NaN for an image without one; `build`: returns the image at an index of the batch."""
        keys = -values if self.largest else values
        for place in keys.argsort(stable=True)[: self.count].tolist():  # NaN is sorted last
            key = float(keys[place])
            if math.isnan(key) or (len(self._kept) == self.count and key >= self._kept[-1][0]):
                break
            bisect.insort(self._kept, (key, build(place)), key=lambda entry: entry[0])
            del self._kept[self.count :]

    @property
    def images(self) -> list[ImageResult]:
        """The images, the most extreme first."""
        return [image for _, image in self._kept]


@dataclass(frozen=True)
class Sample:
    """A random sample of the images, drawn before the pass; used where all values are needed at once (ranks, scatter plots)."""

    indices: Tensor  # (S,), ascending
    weights: Tensor  # (S, E) of the edges, 0 where closed
    labels: Tensor  # (S,), IGNORED without a label
    confidences: Tensor  # (S,)
    losses: Tensor  # (S,), NaN without a label
    executed: Tensor  # (S,), multiply-adds


class Statistics:
    """The meter for statistics of a network's connectivity over a data set.

    `classes`: number of classes; `extremes`: how many of the easiest and of the hardest images to keep, by loss and by executed
    multiply-adds; `chosen`: indices of images to keep; `sampled`: indices of the `Sample`. Memory: E × K numbers, and the
    images kept.

    Raises UsageError for a network without dynamic stages.
    """

    needs_connectivity = True

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        costs: CostModel,
        extremes: int = 0,
        chosen: Sequence[int] = (),
        sampled: Sequence[int] = (),
    ) -> None:
        stages = find_stages(network)
        self.topologies = [stage.topology for stage in stages]
        self.edges = list_edges(self.topologies)
        self.costs = costs
        self.wiring = WiringStatistics(stages, MOST_WIRINGS)
        self.images = self.labelled = self.correct = 0
        self.loss_sum = 0.0
        self.executed_sum = self.executed_square = 0.0  # of executed minus dense cost, for precision
        self.executed_least, self.executed_most = math.inf, -math.inf
        self.class_images = torch.zeros(classes, dtype=torch.int64)
        self.class_sums = torch.zeros(classes, len(self.edges), dtype=torch.float64)
        self.easiest, self.hardest = Extremes(extremes), Extremes(extremes, largest=True)
        self.cheapest, self.dearest = Extremes(extremes), Extremes(extremes, largest=True)
        self.chosen: dict[int, ImageResult | None] = dict.fromkeys(chosen)  # None until the image has been run
        size = len(sampled)
        self.sample = Sample(
            torch.tensor(sorted(sampled), dtype=torch.int64),
            torch.zeros(size, len(self.edges)),
            torch.full((size,), IGNORED),
            *(torch.full((size,), math.nan, dtype=torch.float64) for _ in range(3)),
        )

    def update(self, batch: Batch) -> None:
        """Add a batch whose outputs are logits, (B, K), and whose targets are labels, (B,), IGNORED without a label."""
        found = image_figures(batch, self.costs)
        labels, losses, executed, weights = found.labels, found.losses, found.executed, found.weights
        self.images += len(labels)
        self.wiring.update(batch)

        is_labelled = labels != IGNORED
        self.labelled += int(is_labelled.sum())
        self.correct += int((found.predictions == labels).sum())
        self.loss_sum += float(losses[is_labelled].sum())

        distance = executed - self.costs.dense
        self.executed_sum += float(distance.sum())
        self.executed_square += float(distance.square().sum())
        self.executed_least = min(self.executed_least, float(executed.min()))
        self.executed_most = max(self.executed_most, float(executed.max()))

        self.class_images += labels[is_labelled].bincount(minlength=len(self.class_images))
        self.class_sums.index_add_(0, labels[is_labelled], weights[is_labelled].double())

        def build(place: int) -> ImageResult:
            return ImageResult(
                int(found.indices[place]),
                int(labels[place]) if is_labelled[place] else None,
                int(found.predictions[place]),
                float(found.confidences[place]),
                float(losses[place]) if is_labelled[place] else None,
                float(executed[place]),
                [matrix[place].clone() for matrix in batch.adjacency],
            )

        for extremes, values in (
            (self.easiest, losses),
            (self.hardest, losses),
            (self.cheapest, executed),
            (self.dearest, executed),
        ):
            extremes.update(values, build)
        for place, index in enumerate(found.indices.tolist()):
            if index in self.chosen:
                self.chosen[index] = build(place)
        rows, places = (found.indices[None] == self.sample.indices[:, None]).nonzero(as_tuple=True)
        for kept, values in (
            (self.sample.weights, weights),
            (self.sample.labels, labels),
            (self.sample.confidences, found.confidences),
            (self.sample.losses, losses),
            (self.sample.executed, executed),
        ):
            kept[rows] = values[places].to(kept.dtype)

    @property
    def top1(self) -> float | None:
        """In percent of the labelled images; None if there are none."""
        return 100 * self.correct / self.labelled if self.labelled else None

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy of the labelled images; None if there are none."""
        return self.loss_sum / self.labelled if self.labelled else None

    @property
    def executed_mean(self) -> float:
        """Mean multiply-adds per image."""
        return self.costs.dense + self.executed_sum / self.images

    @property
    def executed_std(self) -> float:
        """Standard deviation of the multiply-adds over the images."""
        variance = self.executed_square / self.images - (self.executed_sum / self.images) ** 2
        return math.sqrt(max(variance, 0.0))

    def mean(self) -> Tensor:
        """Mean weight of every edge, (E,)."""
        return flatten_edges(self.wiring.mean(), self.topologies)

    def std(self) -> Tensor:
        """Standard deviation of every edge's weight over the images, (E,)."""
        return flatten_edges(self.wiring.std(), self.topologies)

    def open_share(self) -> Tensor:
        """Share of images for which every edge is open, (E,)."""
        return flatten_edges(self.wiring.open_share(), self.topologies)

    @property
    def free(self) -> Tensor:
        """Whether each edge's weight comes from the weighting (is not pinned), (E,) bool."""
        return torch.tensor([edge.is_free for edge in self.edges])

    @property
    def classes(self) -> list[int]:
        """The classes that have images, in ascending order."""
        labels: list[int] = self.class_images.nonzero().flatten().tolist()
        return labels

    def class_mean(self) -> Tensor:
        """Mean weight of every edge over the images of each of `classes`, (len(classes), E)."""
        return self.class_sums[self.classes] / self.class_images[self.classes, None]

    def class_distance(self) -> Tensor:
        """Distance between the mean wirings of `classes`, (len(classes), len(classes)).

        It is the root mean square, over the free edges, of the difference of the mean weights.
        """
        means = self.class_mean()[:, self.free]
        distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
        return distance / math.sqrt(max(means.shape[1], 1))
