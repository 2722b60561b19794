"""Checkpoints of detectors, and loading of trained weights to start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dgnet.checkpoint import (
    DESCRIPTION,
    DETECT,
    IMPORTS,
    Described,
    damaged,
    find_checkpoint,
    find_resized,
    load_state,
    load_weights,
    read_run_data,
    read_tensors,
)
from dgnet.detection._config import SIZE_BOUNDS
from dgnet.detection._detector import Detector
from dgnet.errors import UsageError, check_range
from dgnet.models import TimmNetwork, check_finite, classifier_prefixes
from dgnet.typed import Location, read_entry, read_fields

_BODY = "backbone.body."
_HEADS = ("roi_heads.box_predictor.",)


@dataclass(frozen=True)
class DetectorOptions:
    """Arguments of `Detector` other than network and classes, as a checkpoint stores them; `options`: torchvision's.

    Raises UsageError for a value out of range.
    """

    short_side: int
    long_side: int
    fpn_channels: int
    fpn_norm: bool
    frozen_stages: int
    frozen_norm: bool
    options: dict[str, Any]

    def __post_init__(self) -> None:
        for name, bounds in SIZE_BOUNDS.items():
            check_range(name, getattr(self, name), *bounds)
        check_range("frozen_stages", self.frozen_stages, 0)


@dataclass(frozen=True)
class DetectionRunData:
    """Where a run of `dgnet detect train` had its data: the options of the same names."""

    val_data: Location
    images: Location
    val_images: Location | None = None

    @property
    def evaluation_images(self) -> str:
        """The folder of the evaluation images."""
        return self.val_images or self.images


@dataclass(frozen=True)
class DetectorCheckpoint(Described):
    """The content of a checkpoint of `dgnet detect train`. `class_names` belong to the labels 1, 2, …"""

    category_ids: dict[int, int]  # from a label to its category id in the training annotations
    detector: dict[str, Any]  # arguments of Detector other than network and classes

    task = DETECT

    @classmethod
    def read_description(cls, carried: Mapping[str, Any]) -> dict[str, Any]:
        values = super().read_description(carried)
        ids = read_entry(carried, "category_ids", list[int], DESCRIPTION)
        if len(ids) != len(values["class_names"]):
            raise UsageError(f"{DESCRIPTION} has {len(ids)} category_ids for {len(values['class_names'])} classes")
        stored = read_entry(carried, "detector", dict[str, Any], DESCRIPTION)
        options = read_fields(DetectorOptions, stored, f"{DESCRIPTION}: detector")
        return {**values, "category_ids": dict(enumerate(ids, start=1)), "detector": asdict(options)}

    @property
    def data(self) -> DetectionRunData:
        """Where the data of the run is. Raises UsageError if the checkpoint does not say."""
        return read_run_data(DetectionRunData, self)

    def build(self) -> Detector:
        """The trained detector, in evaluation mode. Raises UsageError if the weights do not fit the described detector."""
        network = self.create_network()
        with damaged(self.path):
            detector = Detector(network, len(self.class_names), **self.detector)
        self.load_into(detector, f"do not fit a detector on {self.model}")
        detector.eval()
        return detector


def describe_detector(
    model: str,
    model_kwargs: dict[str, Any],
    class_names: list[str],
    category_ids: dict[int, int],
    detector: dict[str, Any],
    config: dict[str, Any],
    imports: Sequence[str] = (),
) -> dict[str, Any]:
    """The plain values that a checkpoint holds besides its tensors."""
    return {
        "task": DETECT,
        "model": model,
        "model_kwargs": model_kwargs,
        "class_names": class_names,
        "category_ids": [category_ids.get(label, label) for label in range(1, len(class_names) + 1)],
        "detector": detector,
        "config": config,
        **({IMPORTS: list(imports)} if imports else {}),
    }


def load_detector(path: str | Path) -> DetectorCheckpoint:
    """A checkpoint from a run folder (its last one), a .ckpt file, or a model.safetensors of `dgnet detect train`.

    Raises UsageError for a file that is missing, truncated, carries pickled code, or is not a checkpoint of a detector.
    """
    return DetectorCheckpoint.read(path)


def load_backbone(network: TimmNetwork, model: str, path: str | Path) -> list[str] | None:
    """Load a classifier's weights into `network`. Returns the parameters left as initialised, except the classifier layer's.

    Returns None, and changes nothing, if the file is from a detector. Raises UsageError for weights of another model.
    """
    state_dict, _ = read_tensors(find_checkpoint(path))
    if any(name.startswith(_BODY) for name in state_dict):
        return None
    heads = classifier_prefixes(network)
    return [name for name in load_weights(network, model, path).untrained if not name.startswith(heads)]


def load_trained(detector: Detector, path: str | Path) -> list[str]:
    """Load the weights of a detector, dgnet's or torchvision's. Returns the parameters left as initialised.

    These are parameters of the last layers, if the detector was trained for other classes. Raises UsageError for a detector
    with another backbone or pyramid.
    """
    state_dict, _ = read_tensors(find_checkpoint(path))
    with damaged(Path(path)):
        check_finite(state_dict)
    own = detector.state_dict()
    reset = find_resized(state_dict, own, _HEADS)
    difference = load_state(detector, {**state_dict, **{name: own[name] for name in reset}})
    if difference:
        raise UsageError(
            f"{path} holds the weights of another detector ({difference}); give its backbone with --model, and its options"
        )
    return reset
