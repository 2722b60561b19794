"""The most probable classes of single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dgnet._streams import say
from dgnet.checkpoint import Checkpoint
from dgnet.data import decode, find_image_files, read_image
from dgnet.errors import BadImageError


@dataclass(frozen=True)
class Prediction:
    """The classes of one image, most probable first."""

    image: str
    classes: list[str]
    probabilities: list[float]


@torch.no_grad()
def predict(
    checkpoint: Checkpoint,
    images: Sequence[str],
    top_k: int = 5,
    device: str = "cpu",
    bad: list[BadImageError] | None = None,
) -> list[Prediction]:
    """Classify image files and the images in folders one by one, with the checkpoint's preprocessing and class names.

    Of a folder a line on stderr tells what was taken and left out. `bad`: a list to which the errors of images that do not
    decode are added; by default the first one is raised.

    Raises UsageError for a path that does not exist, and BadImageError for an image that does not decode.
    """
    files, ledgers = find_image_files(images)
    transform = checkpoint.preprocessing.evaluation_transform()
    network = None
    predictions = []
    for path, _ in files:
        try:
            tensor = transform(decode(read_image(path), str(path)))
        except BadImageError as error:
            if bad is None:
                raise
            bad.append(error)
            continue
        if network is None:
            network = checkpoint.build_network().to(device)
        probabilities = network(tensor[None].to(device))[0].softmax(0)
        top = probabilities.topk(min(top_k, len(probabilities)))
        names = [checkpoint.class_names[index] for index in top.indices.tolist()]
        predictions.append(Prediction(str(path), names, top.values.tolist()))
    for line in (line for ledger in ledgers for line in ledger.lines() if predictions):
        say(line)
    return predictions
