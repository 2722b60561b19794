"""Images and boxes in COCO's format: a JSON file of annotations and a folder of images.

Letters: A annotations, H and W an image's height and width in pixels, n boxes of an image.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from dgnet.data import Ledger, compose, decode, escape, is_hidden, is_image_name, map_labels, read_image
from dgnet.documents import parse_json
from dgnet.errors import UsageError, reason
from dgnet.paths import find_kind, is_folder


class Target(TypedDict):
    """The training target of torchvision's detectors, and the image's id."""

    boxes: Tensor  # (n, 4) float32: left, top, right, bottom in pixels
    labels: Tensor  # (n,) int64, from 1 on; 0 is background
    image_id: int | None  # None: the image only fills up a batch and does not count


class CocoImage(NamedTuple):
    """An entry of the annotation file's list of images."""

    id: int
    file_name: str
    width: int
    height: int


@dataclass(frozen=True)
class AnnotationCounts:
    """Counts of an annotation file's content. `str()` gives one line for the log."""

    images: int  # used
    boxes: int  # to train on
    crowd_boxes: int = 0  # not trained on; evaluation ignores detections on them
    clipped_boxes: int = 0  # cut at their image's border
    boxes_without_area: int = 0  # also those outside their image; not trained on
    images_without_boxes: int = 0  # not trained on
    repeated_image_ids: int = 0  # only the first is used
    repeated_annotation_ids: int = 0  # only the first is used
    boxes_of_unlisted_images: int = 0  # left out

    def __str__(self) -> str:
        found = [
            ("crowd boxes not trained on", self.crowd_boxes),
            ("boxes clipped to their image", self.clipped_boxes),
            ("boxes without area not trained on", self.boxes_without_area),
            ("images without boxes left out", self.images_without_boxes),
            ("repeated image ids left out", self.repeated_image_ids),
            ("repeated annotation ids left out", self.repeated_annotation_ids),
            ("boxes of images that are not listed left out", self.boxes_of_unlisted_images),
        ]
        oddities = "; ".join(f"{what}: {count:,}" for what, count in found if count)
        return f"{self.images:,} images, {self.boxes:,} boxes" + (f" ({oddities})" if oddities else "")


@dataclass(frozen=True)
class CocoAnnotations:
    """The annotations of a set of images, unchanged: boxes are neither clipped nor left out.

    The annotations of image i are those from `offsets[i]` to `offsets[i + 1]`. `is_target`: which ones are trained on.
    """

    path: Path
    images: list[CocoImage]
    class_names: list[str]  # of the labels 1, 2, …
    category_ids: dict[int, int]  # from a label to its category id, for the categories of the file
    boxes: np.ndarray  # (A, 4) float64: left, top, width, height in pixels
    labels: np.ndarray  # (A,) int64
    areas: np.ndarray  # (A,) float64: of the object; may be smaller than its box
    is_crowd: np.ndarray  # (A,) bool
    is_target: np.ndarray  # (A,) bool
    offsets: np.ndarray  # (images + 1,) int64
    counts: AnnotationCounts
    file_names: frozenset[str] = frozenset()  # of all images of the file, also of those that are left out

    def target(self, index: int) -> Target:
        """The boxes of image `index` to train on, clipped to the image."""
        image = self.images[index]
        own = np.arange(self.offsets[index], self.offsets[index + 1])
        own = own[self.is_target[own]]
        boxes = clip_boxes(self.boxes[own], np.array([[image.width, image.height]]))
        return {"boxes": torch.from_numpy(boxes).float(), "labels": torch.from_numpy(self.labels[own]), "image_id": image.id}


def clip_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Boxes as left, top, right, bottom, clipped to the image, (n, 4).

    `boxes`: left, top, width, height, (n, 4); `sizes`: width and height of their images, (n, 2) or (1, 2).
    """
    start, end = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    return np.concatenate([start.clip(0, sizes), end.clip(0, sizes)], axis=1)


# In pixels. A thinner box has no area: after scaling or flipping, its float32 corners could be equal, and torchvision's
# detectors raise an error for that during training. A box that extends beyond its image by less is a rounding error.
_THIN = 0.01
_LARGEST = 1e12  # the largest number of a box or an area
_LONGEST = 10**6  # the longest side of an image, in pixels


def read_annotations(path: str | Path, is_training: bool = False, class_names: Sequence[str] | None = None) -> CocoAnnotations:
    """The annotations in a JSON file in COCO's format for object detection (cocodataset.org/#format-data).

    If several images or annotations have the same id, only the first is used. Annotations of images that are not listed are
    left out; with `is_training`, also images without a box to train on. Labels are 1 to K in the order of the category ids. If
    `class_names` is given, known from training, they are its positions, counted from 1.

    Raises UsageError for a file in another format or without images, for an annotation whose category is not listed, for a
    category that is not among `class_names`, and with `is_training` for a file without boxes.
    """
    path = Path(path)
    document = _read_document(path)
    names = _read_categories(path, document["categories"])
    category_ids = sorted(names)
    own = [names[id] for id in category_ids]
    known = list(own if class_names is None else class_names)
    labels = {id: label + 1 for id, label in zip(category_ids, map_labels(str(path), own, known), strict=True)}
    images = _read_images(path, document["images"])
    places = {id: place for place, id in enumerate(images)}
    rows, repeated, unlisted = _read_boxes(path, document["annotations"], places, labels)
    if repeated > len(rows):
        raise UsageError(
            f"{path}: {repeated:,} of its {len(document['annotations']):,} annotations have the id of another one, and only the"
            " first of each id counts; give each annotation its own `id`"
        )
    table = np.array(rows, dtype=np.float64).reshape(-1, 8)
    order = np.argsort(table[:, 0], kind="stable")
    place, label, is_crowd = table[order, :3].astype(np.int64).T
    boxes, areas = table[order, 3:7], table[order, 7]

    sizes = np.array([[image.width, image.height] for image in images.values()], dtype=np.float64)[place]
    clipped = clip_boxes(boxes, sizes)
    has_area = (clipped[:, 2:] - clipped[:, :2] >= _THIN).all(1)
    is_target = has_area & (is_crowd == 0)
    is_cut = (np.abs(clipped[:, 2:] - clipped[:, :2] - boxes[:, 2:]) >= _THIN).any(1)
    is_used = np.bincount(place[is_target], minlength=len(images)) > 0
    if not is_training:
        is_used[:] = True
    elif not is_used.any():
        raise UsageError(f"{path} holds no boxes to train on; check its annotations")
    in_use = is_used[place]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(images))[is_used])])
    counts = AnnotationCounts(
        images=int(is_used.sum()),
        boxes=int(is_target.sum()),
        crowd_boxes=int(is_crowd.sum()),
        clipped_boxes=int((is_cut & is_target).sum()),
        boxes_without_area=int((~has_area & (is_crowd == 0)).sum()),
        images_without_boxes=int((~is_used).sum()),
        repeated_image_ids=len(document["images"]) - len(images),
        repeated_annotation_ids=repeated,
        boxes_of_unlisted_images=unlisted,
    )
    return CocoAnnotations(
        path=path,
        images=[image for image, used in zip(images.values(), is_used, strict=True) if used],
        class_names=known,
        category_ids={label: id for id, label in labels.items()},
        boxes=boxes[in_use],
        labels=label[in_use],
        areas=areas[in_use],
        is_crowd=is_crowd[in_use] > 0,
        is_target=is_target[in_use],
        offsets=offsets,
        counts=counts,
        file_names=frozenset(image["file_name"] for image in document["images"]),
    )


def _read_document(path: Path) -> dict[str, list[Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"annotations {path} cannot be read: {reason(error)}") from None
    try:
        document: dict[str, list[Any]] = parse_json(text, f"annotations {path}")
    except UsageError as error:
        message = str(error).replace("is not valid JSON", "is not JSON")
        raise UsageError(f"{message}; expected annotations in COCO's format") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise UsageError(
                f"{path} is not in COCO's format: it lacks the list {name!r}; expected a file like instances_val2017.json"
            )
        if name != "annotations" and not document[name]:
            raise UsageError(f"{path} lists no {name}")
    return document


def _read_categories(path: Path, entries: list[Any]) -> dict[int, str]:
    """The name of each category id. If several categories have the same name, their id is appended."""
    names: dict[int, str] = {}
    for number, entry in enumerate(entries):
        try:
            id, name = _whole(entry["id"]), str(entry["name"])
        except (LookupError, TypeError):
            raise UsageError(
                f"{path}: categories[{number}] is not a category; expected a whole number `id` and a `name`"
            ) from None
        if compose(names.setdefault(id, name)) != compose(name):
            raise UsageError(f"{path}: categories {names[id]!r} and {name!r} have the same id {id}; give each its own")
    names = {id: compose(name) for id, name in names.items()}
    shared = {name for name, count in Counter(names.values()).items() if count > 1}
    return {id: f"{name} ({id})" if name in shared else name for id, name in names.items()}


def _read_images(path: Path, entries: list[Any]) -> dict[int, CocoImage]:
    """Images by id, in the order of the file."""
    images: dict[int, CocoImage] = {}
    for number, entry in enumerate(entries):
        try:
            image = CocoImage(_whole(entry["id"]), entry["file_name"], _whole(entry["width"]), _whole(entry["height"]))
            if not isinstance(image.file_name, str) or not 1 <= min(image.width, image.height) <= _LONGEST:
                raise TypeError
            if "\0" in image.file_name or max(image.width, image.height) > _LONGEST:
                raise TypeError
        except (LookupError, TypeError):
            raise UsageError(
                f"{path}: images[{number}] is not an image; expected `file_name` and whole numbers `id`, `width` and `height`"
            ) from None
        images.setdefault(image.id, image)
    return images


def _read_boxes(
    path: Path, entries: list[Any], places: dict[int, int], labels: dict[int, int]
) -> tuple[list[tuple[float, ...]], int, int]:
    """Rows of (position of the image, label, crowd, left, top, width, height, area).

    Also returns how many annotations had a repeated id, and how many were of an image that is not listed.
    """
    rows: list[tuple[float, ...]] = []
    seen: set[int] = set()
    repeated = unlisted = 0
    for number, entry in enumerate(entries):
        try:
            id, image, category = _whole(entry["id"]), _whole(entry["image_id"]), _whole(entry["category_id"])
            left, top, width, height = map(float, entry["bbox"])
            area = entry.get("area")
            area = width * height if area is None else float(area)
            is_crowd = bool(entry.get("iscrowd"))
            if not all(abs(number) <= _LARGEST for number in (left, top, width, height, area)):  # false for NaN
                raise ValueError
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError):
            raise UsageError(
                f"{path}: annotations[{number}] is not an annotation; expected whole numbers `id`, `image_id`, `category_id`,"
                " and `bbox` as [left, top, width, height] in pixels"
            ) from None
        if image not in places:
            unlisted += 1
        elif id in seen:
            repeated += 1
        elif category not in labels:
            raise UsageError(f"{path}: annotation {id} is of category {category}, which is not listed; add it to `categories`")
        else:
            seen.add(id)
            rows.append((places[image], labels[category], is_crowd, left, top, width, height, area))
    return rows, repeated, unlisted


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1:  # some tools write 1.0
        raise TypeError
    if not -(2**63) <= value < 2**63:
        raise TypeError
    return int(value)


class CocoDetection(Dataset[tuple[Tensor, Target]]):
    """Images with boxes: item i is an image, (3, H, W) float32 in [0, 1], and its `Target`.

    An image is turned according to its EXIF orientation. If only the stored image has the annotated size, it is not turned.

    `is_training`, `class_names`: see `read_annotations`, also for its errors. Raises UsageError if an image file does not
    exist, and BadImageError for an item whose image does not decode or has another size.
    """

    def __init__(
        self,
        annotation_file: str | Path,
        image_folder: str | Path,
        is_training: bool = False,
        class_names: Sequence[str] | None = None,
    ) -> None:
        annotations = read_annotations(annotation_file, is_training, class_names)
        self.folder = Path(image_folder)
        self.annotations, self.unlisted = _find_files(self.folder, annotations)

    @property
    def class_names(self) -> list[str]:
        """The names of the labels 1, 2, …"""
        return self.annotations.class_names

    @property
    def counts(self) -> AnnotationCounts:
        """Counts of the annotation file's content."""
        return self.annotations.counts

    @property
    def ledger(self) -> Ledger:
        """What the annotation file gave and what was left out."""
        counts = self.counts
        summary = str(counts)
        figures = {name: value for name, value in asdict(counts).items() if name != "images"}
        ledger = Ledger(str(self.annotations.path), counts.images, len(self.class_names), summary=summary, figures=figures)
        for name in self.unlisted:
            ledger.leave_out("unlisted_images", name)
        return ledger

    @property
    def aspect_ratios(self) -> list[float]:
        """Width over height of each image."""
        return [image.width / image.height for image in self.annotations.images]

    def __len__(self) -> int:
        return len(self.annotations.images)

    def name(self, index: int) -> str:
        """The path of an image."""
        return str(self.folder / self.annotations.images[index].file_name)

    def load(self, index: int) -> Image.Image:
        """The image, decoded."""
        _, _, width, height = self.annotations.images[index]
        return decode(read_image(Path(self.name(index))), self.name(index), (width, height))

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        return to_tensor(self.load(index)), self.annotations.target(index)


def _find_files(folder: Path, annotations: CocoAnnotations) -> tuple[CocoAnnotations, list[str]]:
    """The annotations with the names of the files as they are stored, and the image files that are not listed.

    Names are equal if their Unicode is (NFC). Lists whole folders, which is faster than a check for each file.

    Raises UsageError if an image file does not exist or a folder cannot be read.
    """
    if not is_folder(folder):
        raise UsageError(f"image folder {folder} does not exist")
    stored: dict[Path, dict[str, str]] = {}  # of each folder the names by their composed form
    images, missing = [], []
    for image in annotations.images:
        path = folder / image.file_name
        if path.parent not in stored:
            stored[path.parent] = _list_names(path.parent)
        name = stored[path.parent].get(compose(path.name), path.name)
        if name == path.name:
            images.append(image)
        else:
            images.append(image._replace(file_name=str(Path(image.file_name).with_name(name))))
        # The second check is for file systems that ignore upper and lower case.
        if compose(name) not in stored[path.parent] and find_kind(path) is None:
            missing.append(path)
    if missing:
        raise UsageError(
            f"image {escape(str(missing[0]))} does not exist ({len(missing):,} of the {len(annotations.images):,} that"
            f" {annotations.path} lists are missing); check the image folder"
        )
    listed = {folder / compose(name) for name in annotations.file_names}
    names = [parent / name for parent, own in stored.items() for name in own if is_image_name(name) and not is_hidden(name)]
    return replace(annotations, images=images), sorted(name.name for name in names if name not in listed)


def _list_names(folder: Path) -> dict[str, str]:
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UsageError(f"image folder {escape(str(folder))} cannot be read: {reason(error)}") from None
    return {**{compose(name): name for name in names}, **{name: name for name in names if compose(name) == name}}


def flip(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Flip an image and its boxes horizontally."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[-1]
    boxes = torch.stack([width - right, top, width - left, bottom], dim=1)
    return image.flip(-1), {**target, "boxes": boxes}
