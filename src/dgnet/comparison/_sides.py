"""What is compared: a classifier or a detector, from a checkpoint to its figures and the calls that are timed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dgnet._cost import CostModel, cost_model
from dgnet.checkpoint import DETECT, Checkpoint, Described, find_checkpoint, read_tensors
from dgnet.data import ImageDataset
from dgnet.detection import CocoDetection, Detector, DetectorCheckpoint, evaluate_detector
from dgnet.errors import UsageError
from dgnet.evaluation import evaluate, open_evaluation_data
from dgnet.graph import find_stages
from dgnet.inference import can_skip, deploy, set_mode, set_sparse, without_gradients

IMAGES = {"classify": 256, "detect": 16}
"""Images that calls are timed on, one batch after the other, so that wirings vary as in use; fewer if there are fewer."""


@dataclass(frozen=True)
class Figures:
    """Accuracy and cost over all images. What a task does not have is None."""

    images: int
    dense_multiply_adds: int
    executed_multiply_adds: float  # mean over the images
    executed_percentiles: dict[str, float]
    top1: float | None = None  # percent
    top5: float | None = None  # percent
    ap: float | None = None  # percent, averaged over IoU 0.50 to 0.95
    ap50: float | None = None  # percent


class Side(Protocol):
    """A network to compare."""

    @property
    def name(self) -> str:
        """What it is called in the results."""

    @property
    def checkpoint(self) -> Described:
        """What it was loaded from."""

    @property
    def network(self) -> nn.Module:
        """The network, in evaluation mode."""

    @property
    def task(self) -> str:
        """What it does: "classify" or "detect"."""

    def named(self, name: str) -> Side:
        """The same under another name."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, in pixels."""

    def default_data(self) -> str:
        """The images that its run was evaluated on."""

    def open_data(self, source: str, root: str | None) -> Any:
        """The images of `source`. `root`: the folder that holds them, for sources that need one."""

    def evaluate(self, dataset: Any, batch_size: int, workers: int, device: str) -> Figures:
        """Accuracy and cost, in one pass."""

    def read_images(self, dataset: Any, count: int, device: str) -> Any:
        """The first `count` images, to time calls on; fewer if there are fewer."""

    def split(self, images: Any, batch_size: int) -> list[Any]:
        """What `read_images` returned, as whole batches."""

    def deploy(self, form: str, batch_size: int, compile: bool, device: str) -> Callable[[Any], object]:
        """The network as it is deployed in a form. It takes a batch of `split`."""


def find_forms(side: Side) -> tuple[str, ...]:
    """The forms in which a network may be deployed."""
    return ("dense", "sparse") if find_stages(side.network) and can_skip(side.network) else ("dense",)


def load_side(name: str, place: str | Path) -> Side:
    """A classifier or a detector from a run folder, a checkpoint or a published network.

    Raises UsageError if it cannot be loaded.
    """
    path = find_checkpoint(place)
    state_dict, carried = read_tensors(path)
    if carried is not None and carried.get("task") == DETECT:
        detector = DetectorCheckpoint.of(path, state_dict, carried)
        return DetectorSide(name, detector, detector.build())
    checkpoint = Checkpoint.of(path, state_dict, carried)
    return ClassifierSide(name, checkpoint, checkpoint.build_network())


@dataclass(frozen=True)
class ClassifierSide:
    """A classifier. It is deployed folded, and compiled if asked."""

    name: str
    checkpoint: Checkpoint
    network: nn.Module
    task: ClassVar[str] = "classify"

    def named(self, name: str) -> ClassifierSide:
        return replace(self, name=name)

    @property
    def size(self) -> tuple[int, int]:
        return self.checkpoint.preprocessing.image_size

    def default_data(self) -> str:
        run = self.checkpoint.data
        return str(run.val_data or run.data)

    def open_data(self, source: str, root: str | None) -> ImageDataset:
        return open_evaluation_data(self.checkpoint, source, root)

    def evaluate(self, dataset: ImageDataset, batch_size: int, workers: int, device: str) -> Figures:
        found = evaluate(self.network, dataset, batch_size, workers, device)
        return Figures(
            found.images,
            found.dense_multiply_adds,
            found.executed_multiply_adds,
            found.executed_percentiles,
            top1=found.top1,
            top5=found.top5,
        )

    def read_images(self, dataset: ImageDataset, count: int, device: str) -> Tensor:
        return torch.stack([dataset[index][0] for index in range(min(count, len(dataset)))]).to(device)

    def split(self, images: Tensor, batch_size: int) -> list[Tensor]:
        whole = [batch for batch in images.split(batch_size) if len(batch) == batch_size]
        return [batch.contiguous(memory_format=torch.channels_last) for batch in whole]

    def deploy(self, form: str, batch_size: int, compile: bool, device: str) -> Callable[[Any], object]:
        return deploy(self.network.to(device), self.size, form, batch_size, compile)


@dataclass(frozen=True)
class DetectorSide:
    """A detector. It is deployed as it is: images differ in size, so nothing is compiled or folded.

    Multiply-adds are those of backbone and pyramid on an image of the size that images are scaled to; the heads are the same on
    all sides.
    """

    name: str
    checkpoint: DetectorCheckpoint
    network: Detector
    task: ClassVar[str] = "detect"

    def named(self, name: str) -> DetectorSide:
        return replace(self, name=name)

    @property
    def size(self) -> tuple[int, int]:
        options = self.checkpoint.detector
        return options["short_side"], options["long_side"]

    def default_data(self) -> str:
        return str(self.checkpoint.data.val_data)

    def open_data(self, source: str, root: str | None) -> CocoDetection:
        return CocoDetection(source, root or self.checkpoint.data.evaluation_images, class_names=self.checkpoint.class_names)

    @cached_property
    def _costs(self) -> CostModel:
        return cost_model(self.network.backbone, self.size)

    def evaluate(self, dataset: CocoDetection, batch_size: int, workers: int, device: str) -> Figures:
        found = evaluate_detector(self.network, dataset, 1, workers, device, costs=self._costs)
        executed = {name: value for name, value in found.executed.items() if name != "executed_std"}
        if found.precision.ap is None:
            raise UsageError(f"{dataset.annotations.path} has no objects to find; compare detectors on images that have some")
        return Figures(len(dataset), ap=found.precision.ap, ap50=found.precision.ap50, **executed)

    def read_images(self, dataset: CocoDetection, count: int, device: str) -> list[Tensor]:
        return [dataset[index][0].to(device) for index in range(min(count, len(dataset)))]

    def split(self, images: list[Tensor], batch_size: int) -> list[list[Tensor]]:
        return [images[start : start + batch_size] for start in range(0, len(images) - batch_size + 1, batch_size)]

    def deploy(self, form: str, batch_size: int, compile: bool, device: str) -> Callable[[Any], object]:
        network = deepcopy(self.network).to(device).eval()
        return without_gradients(set_sparse(network) if form == "sparse" else set_mode(network, "dense"))
