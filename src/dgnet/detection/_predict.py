"""Detection on image files: drawings, and results in COCO's format."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from dgnet._streams import say
from dgnet.data import Ledger, decode, find_image_files, read_image
from dgnet.detection._average_precision import write_results
from dgnet.detection._checkpoint import DetectorCheckpoint
from dgnet.detection._detector import Detector
from dgnet.detection._draw import draw_detections
from dgnet.errors import BadImageError, UsageError, reason
from dgnet.files import replace_content, writing

RESULTS = "results.json"
_BAR_FROM = 10  # a progress bar is shown for this many images or more


@dataclass(frozen=True)
class Drawn:
    """An image, the file with its drawing, and the number of detections drawn."""

    image: str
    drawing: str
    detections: int


def find_images(paths: Sequence[str], output: Path) -> tuple[dict[Path, Path], list[Ledger]]:
    """Image files of `paths` by the file in `output` to which each is drawn. Folders are searched with their subfolders.

    Files in `output`, from an earlier call, are left out. Also returns a ledger for each folder.

    Raises UsageError for a path that does not exist, a folder without images, two images with the same drawing, and an image
    that its drawing would overwrite.
    """
    files, ledgers = find_image_files(paths, besides=output)
    found: dict[Path, Path] = {}
    for file, name in files:
        target = output / name.with_suffix(".jpg")
        if target in found:
            target = output / f"{name}.jpg"
        if target in found:
            raise UsageError(f"{found[target]} and {file} would be drawn to the same file; give each another --output")
        found[target] = file
    sources = {file.resolve() for file in found.values()}
    for target in found:
        if target.resolve() in sources:
            raise UsageError(
                f"--output {output} holds the images themselves, which drawings would overwrite; name another folder"
            )
    return found, ledgers


@torch.no_grad()
def predict_detections(
    checkpoint: DetectorCheckpoint, paths: Sequence[str], output: Path, least_score: float = 0.5, device: str = "cpu"
) -> list[Drawn]:
    """Detect objects on images and folders of images. Writes drawings and `results.json` to the folder `output`.

    `results.json` holds all detections; those with a score of at least `least_score` are drawn. `image_id` is the position of
    the image among all images, counted from 1; `file_name` is its path.

    An image that does not decode or cannot be processed is left out. After all other images, a BadImageError names the
    first such image and their number. Raises UsageError like `find_images`, and if a file cannot be written.
    """
    images, ledgers = find_images(paths, output)
    detector = checkpoint.build().to(device)
    results: list[dict[str, Any]] = []
    drawn: list[Drawn] = []
    bad: list[BadImageError] = []
    bar = tqdm(images.items(), unit="image", file=sys.stderr, mininterval=1, disable=len(images) < _BAR_FROM)
    for number, (target, path) in enumerate(bar, start=1):
        try:
            image = decode(read_image(path), str(path))
            found = _detect(detector, image, device, str(path))
        except BadImageError as error:
            bad.append(error)
            continue
        boxes, labels, scores = found["boxes"].cpu(), found["labels"].cpu(), found["scores"].cpu()
        for (left, top, right, bottom), label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
            box = [left, top, right - left, bottom - top]
            category = checkpoint.category_ids[label]
            results.append({"image_id": number, "category_id": category, "bbox": box, "score": score, "file_name": str(path)})
        shown = scores >= least_score
        drawing = draw_detections(image, boxes[shown], labels[shown], checkpoint.class_names, scores[shown])
        with writing(f"drawing {target}", "name another folder"):
            target.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()  # first in memory: Pillow does not say why a file cannot be written
            drawing.save(content, format="JPEG", quality=90)
            with replace_content(target) as file:
                file.write(content.getvalue())  # a view could outlive the buffer after an error
        drawn.append(Drawn(str(path), str(target), int(shown.sum())))
    if drawn:
        write_results(output / RESULTS, results)
    if bad:
        others = f"; the other {len(drawn):,} are drawn in {output}" if drawn else ""
        left_out = "".join(f"; {ledger.source}: {ledger.describe()}" for ledger in ledgers if ledger.left_out)
        raise BadImageError(f"{bad[0]} ({len(bad):,} of {len(images):,} images do not decode{others}{left_out})")
    for line in (line for ledger in ledgers for line in ledger.lines()):
        say(line)
    return drawn


def _detect(detector: Detector, image: Image.Image, device: str, name: str) -> dict[str, Tensor]:
    """The detections on one image. Raises BadImageError if the detector cannot process it, for example for lack of memory."""
    try:
        (found,) = detector([to_tensor(image).to(device)])
    except RuntimeError as error:
        size = "×".join(map(str, image.size))
        raise BadImageError(f"{name}, {size} pixels, cannot be processed by the detector: {reason(error)}") from None
    detections: dict[str, Tensor] = found
    return detections
