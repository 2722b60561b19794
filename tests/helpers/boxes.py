"""Small sets of images with boxes, in COCO's format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CATEGORIES = [{"id": 7, "name": "cell"}, {"id": 3, "name": "plate"}, {"id": 90, "name": "never seen"}]


def image_entry(id: int, width: int = 64, height: int = 48) -> dict[str, Any]:
    return {"id": id, "file_name": f"{id}.png", "width": width, "height": height}


def box_entry(id: int, image_id: int, bbox: list[float], category_id: int = 7, **more: Any) -> dict[str, Any]:
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def write_set(
    folder: Path, images: list[Any], annotations: list[Any], categories: list[Any] | None = None, draws: bool = True
) -> tuple[Path, Path]:
    """Write the JSON file, and with `draws` an image file for each entry. Returns the path of the JSON and the image folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry in images if draws else []:
        path = folder / "images" / entry["file_name"]
        if not path.exists():
            pixels = np.random.default_rng(entry["id"]).integers(0, 256, (entry["height"], entry["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    document = {"images": images, "annotations": annotations, "categories": CATEGORIES if categories is None else categories}
    (folder / "instances.json").write_text(json.dumps(document))
    return folder / "instances.json", folder / "images"


def random_set(folder: Path, images: int = 12, seed: int = 0, draws: bool = True) -> tuple[Path, Path]:
    """Images with up to eight boxes of every size, some of them crowds. Ids have gaps, and all lists are shuffled."""
    draw = np.random.default_rng(seed)
    entries, annotations = [], []
    for id in draw.permutation(np.arange(images) * 3).tolist():
        width, height = draw.integers(150, 260, 2).tolist()
        entries.append(image_entry(id, width, height))
        for _ in range(draw.integers(0, 9)):
            sides = np.exp(draw.uniform(np.log(8), np.log(140), 2))
            left, top = draw.uniform(0, [width - sides[0], height - sides[1]])
            bbox = [float(value) for value in (left, top, *sides)]
            more = {"area": float(sides.prod() * draw.uniform(0.5, 1)), "iscrowd": int(draw.random() < 0.15)}
            annotations.append(box_entry(len(annotations), id, bbox, [3, 7][draw.integers(2)], **more))
    draw.shuffle(annotations)
    return write_set(folder, entries, annotations, draws=draws)
