"""COCO's average precision (AP) of detections, and results in COCO's format.

A result is {image_id, category_id, bbox: [left, top, width, height] in pixels, score} (cocodataset.org/#format-results).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor

from dgnet._extras import import_extra
from dgnet.detection._coco import CocoAnnotations
from dgnet.documents import read_json
from dgnet.errors import UsageError, check_choice
from dgnet.evaluation import Batch, find_ranks, gather, is_distributed
from dgnet.files import replace_file, writing

BACKENDS = ("pycocotools", "faster-coco-eval")
"""Packages that compute the figures: the reference, and a faster version in C++."""


@dataclass(frozen=True)
class DetectionResult:
    """Average precision in percent, over at most 100 detections per image and class. None if there are no such objects.

    Small objects have an area of less than 32² pixels, large ones of more than 96².
    """

    ap: float | None  # mean over IoU 0.50, 0.55, …, 0.95
    ap50: float | None  # at IoU 0.50
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    by_class: dict[str, dict[str, float | None]]  # the same six figures for each class of the annotations
    images: int  # in the annotations, with or without detections


class CocoEvaluation:
    """Collects the detections of all processes, and computes their average precision.

    An image counts once, even if several processes add it. `backend`: one of BACKENDS.

    Raises UsageError for a backend that is not installed.
    """

    def __init__(self, annotations: CocoAnnotations, backend: str = "pycocotools") -> None:
        load_backend(backend)
        self.annotations, self.backend = annotations, backend
        self._known = {image.id for image in annotations.images}
        self.reset()

    def reset(self) -> None:
        """Remove all detections."""
        self._detections: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def update(self, image_ids: Iterable[int], detections: Iterable[Mapping[str, Tensor]]) -> None:
        """Add the detections of some images, in the form of torchvision's detectors.

        For each image: `boxes` (n, 4), left, top, right, bottom in pixels of the original image, `scores` (n,) and `labels`
        (n,). Detections of a class that is not in the annotations are left out.

        Raises UsageError for an image that is not in the annotations.
        """
        for image_id, found in zip(image_ids, detections, strict=True):
            if image_id not in self._known:
                raise UsageError(f"image {image_id} is not among the {len(self._known):,} images of {self.annotations.path}")
            boxes, scores, labels = (found[name].detach().cpu().numpy() for name in ("boxes", "scores", "labels"))
            is_listed = np.isin(labels, list(self.annotations.category_ids))
            self._detections.setdefault(image_id, (boxes[is_listed], scores[is_listed], labels[is_listed]))

    def results(self) -> list[dict[str, Any]]:
        """The detections of all processes in COCO's format, in the image order of the annotations.

        All processes must call it.
        """
        merged = {id: found for part in reversed(gather(self._detections)) for id, found in part.items()}
        results = []
        for image in self.annotations.images:
            if image.id not in merged:
                continue
            boxes, scores, labels = merged[image.id]
            boxes = boxes.astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            for box, score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
                category = self.annotations.category_ids[label]
                results.append({"image_id": image.id, "category_id": category, "bbox": box, "score": score})
        return results

    def compute(self, results: list[dict[str, Any]] | None = None) -> DetectionResult:
        """The figures, the same in all processes. All processes must call it; the first one computes.

        `results`: the value of `results()`, if it is already known.
        """
        results = self.results() if results is None else results
        computed: list[Any] = [None]
        if find_ranks()[0] == 0:
            computed = [evaluate_results(self.annotations, results, backend=self.backend)]
        if is_distributed():
            dist.broadcast_object_list(computed)
        result: DetectionResult = computed[0]
        return result


class DetectionMeter:
    """Adds the detections to `evaluation`, except those of images without an id, which only fill up a batch."""

    needs_connectivity = False

    def __init__(self, evaluation: CocoEvaluation) -> None:
        self.evaluation = evaluation

    def update(self, batch: Batch) -> None:
        """Add a batch whose targets are a list of `Target` and whose outputs are torchvision's detections."""
        pairs = [(target["image_id"], found) for target, found in zip(batch.targets, batch.outputs, strict=True)]
        counted = [pair for pair in pairs if pair[0] is not None]
        self.evaluation.update([id for id, _ in counted], [found for _, found in counted])


def evaluate_results(
    annotations: CocoAnnotations, results: Sequence[Mapping[str, Any]], *, backend: str = "pycocotools"
) -> DetectionResult:
    """The figures of `results` in COCO's format. Without results they are 0.

    Objects are used as they are in the annotation file: crowds are ignored, boxes are not clipped, and an object without area
    counts although no detection can match it. `backend`: one of BACKENDS; both give the same figures.

    Raises UsageError for results in another format or of other images, and for a backend that is not installed.
    """
    index, evaluator = load_backend(backend)
    check_results(results, annotations, "results")
    table = {"images": [{"id": image.id} for image in annotations.images], "categories": _categories(annotations)}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints each step
        truth, found = index(), index()
        # Not with `loadRes`, which fails for an empty list of results.
        truth.dataset = {**table, "annotations": _objects(annotations)}
        found.dataset = {**table, "annotations": _detections(results)}
        truth.createIndex()
        found.createIndex()
        evaluation = evaluator(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU thresholds, recalls, classes, areas, detections per image), -1 if there is no object
    precision = evaluation.eval["precision"][..., -1]
    thresholds = [round(100 * threshold) for threshold in evaluation.params.iouThrs]
    names = [category["name"] for category in table["categories"]]

    def figures(precision: np.ndarray) -> dict[str, float | None]:
        return {
            "ap": _mean(precision[..., 0]),
            "ap50": _mean(precision[thresholds.index(50), ..., 0]),
            "ap75": _mean(precision[thresholds.index(75), ..., 0]),
            "ap_small": _mean(precision[..., 1]),
            "ap_medium": _mean(precision[..., 2]),
            "ap_large": _mean(precision[..., 3]),
        }

    return DetectionResult(
        **figures(precision),
        by_class={name: figures(precision[:, :, place]) for place, name in enumerate(names)},
        images=len(annotations.images),
    )


def check_results(results: Any, annotations: CocoAnnotations, where: str) -> None:
    """Raises UsageError, which begins with `where`, for results in another format or of other images or categories."""
    if not isinstance(results, Sequence) or isinstance(results, str):
        found = "null" if results is None else f"a {type(results).__name__}"
        raise UsageError(f"{where}: expected a list of {{image_id, category_id, bbox, score}}, got {found}")
    images = {image.id for image in annotations.images}
    categories = set(annotations.category_ids.values())
    for number, result in enumerate(results):
        try:
            image, category = result["image_id"], result["category_id"]
            left, top, width, height = result["bbox"]
            is_good = math.isfinite(left + top + width + height + result["score"]) and width >= 0 and height >= 0
            is_known = image in images, category in categories
        except (LookupError, TypeError, ValueError, OverflowError):
            is_good = False
        if not is_good:
            raise UsageError(
                f"{where}[{number}] is not a result; expected `image_id`, `category_id`, `score`, and `bbox` as"
                " [left, top, width, height] in pixels"
            )
        if not all(is_known):
            what = f"category {category!r}" if is_known[0] else f"image {image!r}"
            raise UsageError(f"{where}[{number}] is of {what}, which is not in {annotations.path}")


def read_results(path: str | Path, annotations: CocoAnnotations) -> list[dict[str, Any]]:
    """Results from a JSON file in COCO's format. Raises UsageError like `check_results`, and for an unreadable file."""
    results: list[dict[str, Any]] = read_json(path, "results")
    check_results(results, annotations, str(path))
    return results


def write_results(path: str | Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write results in COCO's format to a JSON file. Raises UsageError if it cannot be written; an old file then stays."""
    path = Path(path)
    with writing(f"results {path}", "name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as written:
            written.write_text(json.dumps(list(results)), encoding="utf-8")


def load_backend(name: str = BACKENDS[0]) -> tuple[Any, Any]:
    """The two classes of a backend: annotations, and evaluation. Raises UsageError if it is unknown or not installed."""
    check_choice("evaluation backend", name, BACKENDS)
    if name == "pycocotools":
        coco, evaluation = (
            import_extra(f"pycocotools.{module}", "the evaluation of detections") for module in ("coco", "cocoeval")
        )
        return coco.COCO, evaluation.COCOeval
    faster = import_extra("faster_coco_eval", "--backend faster-coco-eval")
    return faster.COCO, faster.COCOeval_faster


def _categories(annotations: CocoAnnotations) -> list[dict[str, Any]]:
    """Sorted by id, the order of classes in the backends."""
    ids = sorted((id, annotations.class_names[label - 1]) for label, id in annotations.category_ids.items())
    return [{"id": id, "name": name} for id, name in ids]


def _objects(annotations: CocoAnnotations) -> list[dict[str, Any]]:
    counts = np.diff(annotations.offsets)
    images = np.repeat([image.id for image in annotations.images], counts)
    columns = zip(
        images.tolist(),
        annotations.labels.tolist(),
        annotations.boxes.tolist(),
        annotations.areas.tolist(),
        annotations.is_crowd.tolist(),
        strict=True,
    )
    return [
        {
            "id": id,  # from 1 on, because for the backends a match with id 0 is no match
            "image_id": image,
            "category_id": annotations.category_ids[label],
            "bbox": box,
            "area": area,
            "iscrowd": int(is_crowd),
        }
        for id, (image, label, box, area, is_crowd) in enumerate(columns, start=1)
    ]


def _detections(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**result, "id": id, "area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
        for id, result in enumerate(results, start=1)
    ]


def _mean(precision: np.ndarray) -> float | None:
    """The mean in percent; None if there is no object."""
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None
