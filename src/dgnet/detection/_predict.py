"""Detections on image files: drawn, and as results in COCO's format."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from dgnet.data._images import decode, read_image
from dgnet.detection._average_precision import write_results
from dgnet.detection._checkpoint import DetectorCheckpoint
from dgnet.detection._draw import draw_detections
from dgnet.errors import BadImageError, UsageError
from dgnet.files import replace_file, writing

RESULTS = "results.json"
_MANY = 10  # images, which take a few seconds: there is a bar


@dataclass(frozen=True)
class Drawn:
    """An image's detections: where they are drawn, and how many there are."""

    image: str
    drawing: str
    detections: int


def find_images(paths: Sequence[str], output: Path) -> dict[Path, Path]:
    """Image files, and those in folders and theirs, by the file in the folder `output` that each is drawn to.

    What lies in `output` already, from another call, is left out. Raises UsageError for a path that does not exist, a folder
    without images, and an image that would be drawn over.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())
            if output.resolve() != path.resolve():
                files = [file for file in files if output.resolve() not in file.resolve().parents]
            if not files:
                raise UsageError(f"folder {path} holds no images")
            named = [(file.relative_to(path), file) for file in files]
        elif path.is_file():
            named = [(Path(path.name), path)]
        else:
            raise UsageError(f"image {path} does not exist")
        for name, file in named:
            target = output / name.with_suffix(".jpg")
            if target in found:
                target = output / f"{name}.jpg"
            if target in found:
                raise UsageError(f"{found[target]} and {file} would be drawn to the same file; give them another --output each")
            found[target] = file
    sources = {file.resolve() for file in found.values()}
    for target in found:
        if target.resolve() in sources:
            raise UsageError(
                f"--output {output} holds the images themselves, which drawings would replace; name another folder"
            )
    return found


@torch.no_grad()
def predict_detections(
    checkpoint: DetectorCheckpoint, paths: Sequence[str], output: Path, least_score: float = 0.5, device: str = "cpu"
) -> list[Drawn]:
    """Detect on images and in folders of them; writes drawings and `results.json` to the folder `output`.

    A result of `results.json` has the image's place among the images, from 1 on, as `image_id`, and its `file_name`; all
    detections are there, those of a score from `least_score` on are drawn.

    An image that does not decode is left out, and named when all are done: in a BadImageError, with how many there are.
    Raises UsageError for what `find_images` does, and where nothing can be written.
    """
    images = find_images(paths, output)
    detector = checkpoint.build().to(device)
    results: list[dict[str, Any]] = []
    drawn: list[Drawn] = []
    bad: list[BadImageError] = []
    bar = tqdm(images.items(), unit="image", file=sys.stderr, mininterval=1, disable=len(images) < _MANY)
    for number, (target, path) in enumerate(bar, start=1):
        try:
            image = decode(read_image(path), str(path))
        except BadImageError as error:
            bad.append(error)
            continue
        (found,) = detector([to_tensor(image).to(device)])
        boxes, labels, scores = found["boxes"].cpu(), found["labels"].cpu(), found["scores"].cpu()
        for (left, top, right, bottom), label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
            box = [left, top, right - left, bottom - top]
            category = checkpoint.category_ids[label]
            results.append({"image_id": number, "category_id": category, "bbox": box, "score": score, "file_name": str(path)})
        shown = scores >= least_score
        drawing = draw_detections(image, boxes[shown], labels[shown], checkpoint.class_names, scores[shown])
        with writing(f"drawing {target}", "name another folder"):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(target) as written:
                drawing.save(written, format="JPEG", quality=90)
        drawn.append(Drawn(str(path), str(target), int(shown.sum())))
    if drawn:
        write_results(output / RESULTS, results)
    if bad:
        others = f"; the other {len(drawn):,} are drawn in {output}" if drawn else ""
        raise BadImageError(f"{bad[0]} ({len(bad):,} of {len(images):,} images do not decode{others})")
    return drawn
