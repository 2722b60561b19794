"""The most probable classes of single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dgnet.checkpoint import Checkpoint
from dgnet.data import decode, read_image
from dgnet.errors import UsageError


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, most probable first."""

    image: str
    classes: list[str]
    probabilities: list[float]


@torch.no_grad()
def predict(checkpoint: Checkpoint, images: Sequence[str], top_k: int = 5, device: str = "cpu") -> list[Prediction]:
    """Classify image files one by one, with the checkpoint's preprocessing and class names.

    Raises UsageError for a file that is missing or does not decode. All files are read before the first is classified.
    """
    transform = checkpoint.preprocessing.evaluation_transform()
    inputs = []
    for image in images:
        if Path(image).is_dir():
            raise UsageError(f"{image} is a folder; name image files, as in {image}/*.jpg")
        if not Path(image).is_file():
            raise UsageError(f"image {image} does not exist")
        inputs.append(transform(decode(read_image(Path(image)), image)))
    network = checkpoint.build_network().to(device)
    predictions = []
    for image, tensor in zip(images, inputs, strict=True):
        probabilities = network(tensor[None].to(device))[0].softmax(0)
        top = probabilities.topk(min(top_k, len(probabilities)))
        names = [checkpoint.class_names[index] for index in top.indices.tolist()]
        predictions.append(Prediction(image, names, top.values.tolist()))
    return predictions
