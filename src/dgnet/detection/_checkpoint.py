"""Checkpoints of detectors, and loading of trained weights to start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgnet.checkpoint import DETECT, Described, find_checkpoint, find_resized, load_state, load_weights, read_tensors
from dgnet.detection._detector import Detector
from dgnet.errors import UsageError
from dgnet.models import TimmNetwork, classifier_prefixes, create_model

_BODY = "backbone.body."
_HEADS = ("roi_heads.box_predictor.",)


@dataclass(frozen=True)
class DetectorCheckpoint(Described):
    """The content of a checkpoint of `dgnet detect train`. `class_names` belong to the labels 1, 2, …"""

    category_ids: dict[int, int]  # from a label to its category id in the training annotations
    detector: dict[str, Any]  # arguments of Detector other than network and classes

    task = DETECT

    @staticmethod
    def read_own(carried: Mapping[str, Any]) -> dict[str, Any]:
        ids = [int(id) for id in carried["category_ids"]]
        return {"category_ids": dict(enumerate(ids, start=1)), "detector": dict(carried["detector"])}

    def build(self) -> Detector:
        """The trained detector, in evaluation mode. Raises UsageError if the weights do not fit the described detector."""
        detector = Detector(create_model(self.model, **self.model_kwargs), len(self.class_names), **self.detector)
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
    state_dict, _ = read_tensors(find_checkpoint(Path(path)))
    if any(name.startswith(_BODY) for name in state_dict):
        return None
    heads = classifier_prefixes(network)
    return [name for name in load_weights(network, model, path) if not name.startswith(heads)]


def load_trained(detector: Detector, path: str | Path) -> list[str]:
    """Load the weights of a detector, dgnet's or torchvision's. Returns the parameters left as initialised.

    These are parameters of the last layers, if the detector was trained for other classes. Raises UsageError for a detector
    with another backbone or pyramid.
    """
    state_dict, _ = read_tensors(find_checkpoint(Path(path)))
    own = detector.state_dict()
    reset = find_resized(state_dict, own, _HEADS)
    difference = load_state(detector, {**state_dict, **{name: own[name] for name in reset}})
    if difference:
        raise UsageError(
            f"{path} holds the weights of another detector ({difference}); give its backbone with --model, and its options"
        )
    return reset
