from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dgnet.detection import AnnotationCounts, CocoDetection, flip, read_annotations
from dgnet.errors import BadImageError, UsageError
from tests.helpers.boxes import CATEGORIES, box_entry, image_entry, random_set, write_set
from tests.helpers.data import SHARED_DATA

WHOLE = [10.0, 20.0, 30.0, 8.0]


def open_set(folder: Any, images: list[Any], annotations: list[Any], is_training: bool = True, **more: Any) -> CocoDetection:
    return CocoDetection(*write_set(folder, images, annotations), is_training, **more)


def test_an_item_is_an_image_and_the_boxes_of_its_objects(tmp_path):
    dataset = open_set(tmp_path, [image_entry(5)], [box_entry(1, 5, WHOLE), box_entry(2, 5, [0, 0, 64, 48], 3)])
    image, target = dataset[0]
    pixels = np.array(Image.open(tmp_path / "images" / "5.png"))
    assert (image.dtype, target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.float32, torch.int64)
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))
    assert target["boxes"].tolist() == [[10, 20, 40, 28], [0, 0, 64, 48]]
    assert target["image_id"] == 5
    assert str(dataset.counts) == "1 images, 2 boxes"
    assert dataset.aspect_ratios == [64 / 48]


def test_labels_leave_no_gaps_between_category_ids(tmp_path):
    dataset = open_set(tmp_path, [image_entry(5)], [box_entry(1, 5, WHOLE), box_entry(2, 5, WHOLE, 3)])
    assert dataset.class_names == ["plate", "cell", "never seen"]
    assert dataset.annotations.category_ids == {1: 3, 2: 7, 3: 90}
    assert dataset[0][1]["labels"].tolist() == [2, 1]


def test_labels_are_those_known_from_training(tmp_path):
    names = ["cell", "something else", "never seen", "plate"]
    dataset = open_set(tmp_path, [image_entry(5)], [box_entry(1, 5, WHOLE), box_entry(2, 5, WHOLE, 3)], class_names=names)
    assert dataset.class_names == names
    assert dataset.annotations.category_ids == {4: 3, 1: 7, 3: 90}
    assert dataset[0][1]["labels"].tolist() == [1, 4]
    with pytest.raises(UsageError, match="class 'plate' is not one of the 1 classes known from training"):
        open_set(tmp_path, [image_entry(5)], [box_entry(1, 5, WHOLE)], class_names=["cell"])


def test_names_that_categories_share_are_told_apart(tmp_path):
    path, _ = write_set(tmp_path, [image_entry(1)], [], [{"id": 0, "name": "cell"}, {"id": 1, "name": "cell"}])
    assert read_annotations(path).class_names == ["cell (0)", "cell (1)"]


PLAIN = AnnotationCounts(images=1, boxes=1)
ODD: dict[str, tuple[list[Any], list[Any], AnnotationCounts, list[list[float]]]] = {
    "crowd": ([], [box_entry(2, 1, [0, 0, 9, 9], iscrowd=1)], replace(PLAIN, crowd_boxes=1), []),
    "leaves its image": (
        [],
        [box_entry(2, 1, [-5, -6, 100, 30])],
        replace(PLAIN, boxes=2, clipped_boxes=1),
        [[0, 0, 64, 24]],
    ),
    "rounded at the border": ([], [box_entry(2, 1, [4, 8, 60.004, 40])], replace(PLAIN, boxes=2), [[4, 8, 64, 48]]),
    "no width": ([], [box_entry(2, 1, [9, 9, 0, 9])], replace(PLAIN, boxes_without_area=1), []),
    "negative height": ([], [box_entry(2, 1, [9, 9, 5, -3])], replace(PLAIN, boxes_without_area=1), []),
    "too thin for float32": ([], [box_entry(2, 1, [9, 9, 1e-7, 9])], replace(PLAIN, boxes_without_area=1), []),
    "outside": ([], [box_entry(2, 1, [70, 9, 5, 5])], replace(PLAIN, boxes_without_area=1), []),
    "image without boxes": ([image_entry(2)], [], replace(PLAIN, images_without_boxes=1), []),
    "image with a crowd only": (
        [image_entry(2)],
        [box_entry(2, 2, WHOLE, iscrowd=1)],
        replace(PLAIN, images_without_boxes=1, crowd_boxes=1),
        [],
    ),
    "repeated image": (
        [{**image_entry(1), "file_name": "other.png"}],
        [box_entry(2, 1, [0, 0, 9, 9])],
        replace(PLAIN, boxes=2, repeated_image_ids=1),
        [[0, 0, 9, 9]],
    ),
    "repeated annotation": ([], [box_entry(1, 1, [0, 0, 9, 9])], replace(PLAIN, repeated_annotation_ids=1), []),
    "image not listed": ([], [box_entry(1, 8, [0, 0, 9, 9])], replace(PLAIN, boxes_of_unlisted_images=1), []),
}


@pytest.mark.parametrize("kind", ODD)
def test_oddities_are_counted_and_kept_out_of_training(tmp_path, kind):
    images, annotations, counts, more = ODD[kind]
    first = [box_entry(1, 1, WHOLE)]
    dataset = open_set(tmp_path, [image_entry(1), *images], first + annotations)
    assert dataset.counts == counts
    assert len(dataset) == 1
    assert dataset.name(0).endswith("1.png")
    torch.testing.assert_close(dataset[0][1]["boxes"], torch.tensor([[10.0, 20, 40, 28], *more]))
    odd = counts != replace(PLAIN, boxes=counts.boxes)
    assert ("(" in str(counts)) == odd
    assert str(counts).count(": 1") == odd + (kind == "image with a crowd only")
    evaluated = CocoDetection(tmp_path / "instances.json", tmp_path / "images")
    assert len(evaluated) == 1 + counts.images_without_boxes
    assert evaluated.counts == replace(counts, images=len(evaluated), images_without_boxes=0)
    left_out = counts.repeated_annotation_ids + counts.boxes_of_unlisted_images
    assert evaluated.annotations.boxes.tolist() == [entry["bbox"] for entry in first + annotations][: 2 - left_out or None]


def test_boxes_belong_to_their_images(tmp_path):
    path, folder = random_set(tmp_path)
    document = json.loads(path.read_text())
    dataset = CocoDetection(path, folder)
    assert len(dataset) == len(document["images"])
    for index, entry in enumerate(document["images"]):
        image, target = dataset[index]
        assert image.shape == (3, entry["height"], entry["width"])
        own = [a for a in document["annotations"] if a["image_id"] == target["image_id"] == entry["id"] and not a["iscrowd"]]
        boxes = [[left, top, left + width, top + height] for left, top, width, height in (a["bbox"] for a in own)]
        torch.testing.assert_close(target["boxes"], torch.tensor(boxes).reshape(-1, 4))
        assert target["labels"].tolist() == [{3: 1, 7: 2}[a["category_id"]] for a in own]


def test_an_image_without_boxes_is_evaluated_on(tmp_path):
    dataset = open_set(tmp_path, [image_entry(1)], [], is_training=False)
    _, target = dataset[0]
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)


def save_on_its_side(path: Any, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° clockwise to see it upright
    Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


@pytest.mark.parametrize("turned", [True, False])
def test_an_image_is_turned_as_its_boxes_are(tmp_path, turned):
    upright = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    save_on_its_side(tmp_path / "images" / "1.png", upright)
    entry = image_entry(1, 64, 48) if turned else image_entry(1, 48, 64)
    image, _ = open_set(tmp_path, [entry], [box_entry(1, 1, [1, 1, 9, 9])])[0]
    expected = upright if turned else np.rot90(upright)
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), expected)


def test_an_image_of_another_size_is_named_with_both(tmp_path):
    dataset = open_set(tmp_path, [image_entry(1, 64, 48)], [box_entry(1, 1, WHOLE)])
    Image.new("RGB", (30, 20)).save(tmp_path / "images" / "1.png")
    with pytest.raises(UsageError, match=r"1\.png is 30 × 20 pixels, its annotations expect 64 × 48"):
        dataset[0]


def test_a_broken_image_is_named(tmp_path):
    dataset = open_set(tmp_path, [image_entry(1)], [box_entry(1, 1, WHOLE)])
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadImageError, match=r"1\.png does not decode as an image"):
        dataset[0]


def test_missing_images_are_named_and_counted_at_opening(tmp_path):
    entries = [image_entry(id) for id in (1, 2, 3)]
    open_set(tmp_path, entries, [box_entry(1, 1, WHOLE)])
    for id in (2, 3):
        (tmp_path / "images" / f"{id}.png").unlink()
    CocoDetection(tmp_path / "instances.json", tmp_path / "images", is_training=True)  # they have no boxes
    with pytest.raises(UsageError, match=r"2\.png does not exist \(2 of the 3 that .*instances\.json lists are missing\)"):
        CocoDetection(tmp_path / "instances.json", tmp_path / "images")
    with pytest.raises(UsageError, match=r"image folder .*nowhere does not exist"):
        CocoDetection(tmp_path / "instances.json", tmp_path / "nowhere")


def test_images_may_lie_in_folders_of_the_folder(tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    entry = {**image_entry(1), "file_name": "a/1.png"}
    assert open_set(tmp_path, [entry], [box_entry(1, 1, WHOLE)])[0][0].shape == (3, 48, 64)


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "is not JSON"),
    "a list": ([], "is not in COCO's format: it lacks the list 'images'"),
    "no annotations": ({"images": [image_entry(1)], "categories": CATEGORIES}, "it lacks the list 'annotations'"),
    "no images": ({"images": [], "annotations": [], "categories": CATEGORIES}, "lists no images"),
    "no categories": ({"images": [image_entry(1)], "annotations": [], "categories": []}, "lists no categories"),
    "an image without width": (
        {"images": [image_entry(1), {"id": 2, "file_name": "a"}]},
        r"images\[1\] is not an image; expected",
    ),
    "an image of no height": ({"images": [image_entry(1, 64, 0)]}, r"images\[0\] is not an image; expected"),
    "an image id as text": ({"images": [{**image_entry(1), "id": "1"}]}, r"images\[0\] is not an image; expected"),
    "a category without name": ({"categories": [{"id": 1}]}, r"categories\[0\] is not a category; expected"),
    "one id for two": ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "'a' and 'b' have the same id 1"),
    "no box": (
        {"annotations": [{"id": 1, "image_id": 1, "category_id": 7}]},
        r"annotations\[0\] is not an annotation; expected",
    ),
    "three numbers": ({"annotations": [box_entry(1, 1, [1, 2, 3])]}, r"annotations\[0\] is not an annotation; expected"),
    "not finite": (
        {"annotations": [box_entry(1, 1, [1, 2, float("nan"), 4])]},
        r"annotations\[0\] is not an annotation; expected",
    ),
    "text": ({"annotations": ["box"]}, r"annotations\[0\] is not an annotation; expected"),
    "an unknown category": ({"annotations": [box_entry(9, 1, WHOLE, 8)]}, "annotation 9 is of category 8, which is not listed"),
    "nothing to train on": ({"annotations": [box_entry(9, 1, WHOLE, iscrowd=1)]}, "holds no boxes to train on"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_annotations_are_named(tmp_path, kind):
    content, message = BAD[kind]
    good = {"images": [image_entry(1)], "annotations": [box_entry(1, 1, WHOLE)], "categories": CATEGORIES}
    if isinstance(content, dict) and kind != "no annotations":
        content = {**good, **content}
    path = tmp_path / "instances.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError, match=message) as raised:
        read_annotations(path, is_training=True)
    assert "\n" not in str(raised.value)


def test_annotations_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UsageError, match=r"annotations .*nowhere\.json cannot be read: No such file"):
        read_annotations(tmp_path / "nowhere.json")


def test_a_flip_mirrors_pixels_and_boxes(tmp_path):
    dataset = open_set(tmp_path, [image_entry(1)], [box_entry(1, 1, WHOLE), box_entry(2, 1, [0, 0, 5, 9])])
    image, target = dataset[0]
    for left, top, right, bottom in target["boxes"].int().tolist():
        image[:, top:bottom, left:right] = 2
    flipped, mirrored = flip(image, target)
    marked = torch.zeros(48, 64, dtype=torch.bool)
    for left, top, right, bottom in mirrored["boxes"].int().tolist():
        marked[top:bottom, left:right] = True
    assert torch.equal(flipped[0] == 2, marked)
    assert mirrored["boxes"].tolist() == [[24, 20, 54, 28], [59, 0, 64, 9]]
    again, boxes = flip(flipped, mirrored)
    assert torch.equal(again, image)
    assert torch.equal(boxes["boxes"], target["boxes"])


@pytest.mark.parametrize(("split", "images", "boxes"), [("train", 205, 2805), ("val", 87, 1138), ("test", 72, 945)])
def test_blood_cells(split, images, boxes):
    root = SHARED_DATA / "bccd"
    if not root.is_dir():
        pytest.skip(f"the blood cells are not at {root}")
    dataset = CocoDetection(root / f"instances_{split}.json", root / "images", is_training=split == "train")
    assert dataset.counts == AnnotationCounts(images=images, boxes=boxes)
    assert dataset.class_names == ["RBC", "WBC", "Platelets"]
    image, target = dataset[images - 1]
    assert image.shape == (3, 480, 640)
    assert len(target["boxes"]) == len(target["labels"]) > 0


def test_repeated_annotation_ids_are_counted_and_most_are_refused(tmp_path):
    some = [box_entry(1, 1, WHOLE), box_entry(2, 1, WHOLE), box_entry(2, 1, [0, 0, 5, 5])]
    ledger = open_set(tmp_path / "some", [image_entry(1)], some).ledger
    assert "repeated annotation ids left out: 1" in str(ledger)
    assert ledger.document()["repeated_annotation_ids"] == 1
    with pytest.raises(
        UsageError, match=r"72 of its 73 annotations have the id of another one, .*give each annotation its own"
    ):
        open_set(tmp_path / "all", [image_entry(1)], [box_entry(1, 1, WHOLE) for _ in range(73)])


def test_image_files_that_are_not_listed_are_counted(tmp_path):
    write_set(tmp_path, [image_entry(1), image_entry(2)], [])
    (tmp_path / "images" / "._1.png").write_bytes(b"")
    dataset = open_set(tmp_path, [image_entry(1)], [], is_training=False)
    assert str(dataset.ledger).endswith("1 images, 0 boxes; left out: 1 image that is not listed (2.png)")


@pytest.mark.parametrize(("stored", "listed"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_are_equal_in_every_unicode_form(tmp_path, stored, listed):
    names = {form: unicodedata.normalize(form, "Füchse") for form in ("NFC", "NFD")}
    entry = image_entry(1)
    write_set(tmp_path, [{**entry, "file_name": f"{names[stored]}.png"}], [])
    listing = [{**entry, "file_name": f"{names[listed]}.png"}]
    write_set(tmp_path, listing, [box_entry(1, 1, WHOLE, 1)], [{"id": 1, "name": names[listed]}], draws=False)
    dataset = CocoDetection(tmp_path / "instances.json", tmp_path / "images", class_names=[names[stored]])
    assert dataset[0][1]["labels"].tolist() == [1]


@pytest.mark.parametrize("number", [10**19, 10**300, 1e13, -(10**20)])
@pytest.mark.parametrize("place", ["box", "area", "id", "width"])
def test_numbers_out_of_range_are_named(tmp_path, number, place):
    entry = {**image_entry(1), **({"width": number} if place == "width" else {})}
    box = box_entry(1, 1, [number, 0, 1, 1] if place == "box" else WHOLE)
    if place in ("area", "id"):
        box[place] = number
    write_set(tmp_path, [entry], [box], draws=False)
    if place == "id" and number == 1e13:
        assert read_annotations(tmp_path / "instances.json").counts.boxes == 1
        return
    with pytest.raises(UsageError, match=r"out of range|is not an annotation|is not an image"):
        read_annotations(tmp_path / "instances.json")
