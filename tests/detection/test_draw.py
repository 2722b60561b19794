from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from dgnet.detection import draw_detections
from dgnet.detection._draw import class_colour

NAMES = ["cell", "plate"]
BOXES = torch.tensor([[40.0, 60, 120, 140], [150, 30, 190, 170]])


def blank(width: int = 240, height: int = 200, shade: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, shade, shade))


def is_colour(image: Image.Image, label: int) -> np.ndarray:
    """Where the image has the colour of a class, (H, W)."""
    return (np.array(image) == class_colour(label)).all(2)


def test_boxes_have_the_colour_of_their_class():
    drawn = draw_detections(blank(), BOXES, torch.tensor([1, 2]), NAMES)
    assert (drawn.mode, drawn.size) == ("RGB", (240, 200))
    for label, (left, top, right, bottom) in enumerate(BOXES.int().tolist(), start=1):
        coloured = is_colour(drawn, label)
        assert coloured[bottom, left : right + 1].all()
        assert coloured[top : bottom + 1, left].all()
        assert coloured[top : bottom + 1, right].all()
        rows, columns = coloured.nonzero()
        assert (rows.max(), columns.min()) == (bottom, left)
        assert not coloured[top + 4 : bottom - 3, left + 4 : right - 3].any()  # the object can be seen


def test_a_label_stands_above_its_box_and_says_class_and_score():
    plain, scored = (
        draw_detections(blank(), BOXES[:1], torch.tensor([1]), NAMES, scores) for scores in (None, torch.tensor([0.87]))
    )
    narrow, wide = (is_colour(image, 1)[:60].any(0).sum() for image in (plain, scored))
    assert wide > narrow > 20
    tag = np.array(scored)[48:58, 41 : 40 + wide - 1]
    assert ((tag < 60).all(2) | (tag > 220).all(2)).mean() > 0.1  # letters
    other = draw_detections(blank(), BOXES[:1], torch.tensor([1]), ["plate", "cell"])
    assert not np.array_equal(np.array(plain), np.array(other))


@pytest.mark.parametrize("box", [[0.0, 0, 8, 8], [235, 2, 239, 199], [0, 0, 239, 199], [230, 195, 239, 199]])
def test_a_label_at_the_border_is_whole(box):
    def tag(box: list[float]) -> np.ndarray:
        drawn = draw_detections(blank(), torch.tensor([box]), torch.tensor([1]), NAMES, torch.tensor([0.5]))
        changed = (np.array(drawn) != 128).any(2)
        left, top, right, bottom = map(int, box)
        for edge in (np.s_[top : bottom + 1, left], np.s_[top : bottom + 1, right], np.s_[bottom, left : right + 1]):
            changed[edge] = False
        return np.array([changed.any(0).sum(), changed.any(1).sum()])  # width and height

    assert (tag(box) >= tag([100.0, 100, 101, 101]) - 2).all()


def test_the_best_lies_on_top():
    boxes = torch.tensor([[50.0, 50, 150, 150], [50, 50, 150, 150]])
    for scores, top in (([0.9, 0.2], 1), ([0.2, 0.9], 2)):
        drawn = draw_detections(blank(), boxes, torch.tensor([1, 2]), NAMES, torch.tensor(scores))
        assert is_colour(drawn, top)[150, 50:151].all()
        assert not is_colour(drawn, 3 - top)[150].any()


def test_lines_grow_with_the_image():
    box = BOXES[:1]
    thin, thick = (
        draw_detections(blank(side, side), box * scale, torch.tensor([1]), NAMES) for side, scale in ((240, 1), (1920, 8))
    )
    assert is_colour(thin, 1)[100].sum() < is_colour(thick, 1)[800].sum() / 3


def test_an_image_without_detections_is_left_as_it_is():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8))
    drawn = draw_detections(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), NAMES, torch.zeros(0))
    assert np.array_equal(np.array(drawn), np.array(image.convert("RGB")))


def test_drawing_leaves_the_image_and_the_detections_alone():
    image, boxes = blank(), BOXES.clone()
    draw_detections(image, boxes, torch.tensor([1, 2]), NAMES, torch.tensor([0.9, 0.1]))
    assert (np.array(image) == 128).all()
    assert torch.equal(boxes, BOXES)


def test_classes_of_coco_can_be_told_apart():
    colours = [np.array(class_colour(label)) for label in range(1, 81)]
    assert len({tuple(colour) for colour in colours}) == 80
    assert min(abs(a - b).max() for a, b in itertools.pairwise(colours)) > 100
