"""Detections drawn on their image."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from dgnet._streams import escape

# matplotlib's own font: labels look the same on every machine, and it has the letters of most scripts.
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def draw_detections(
    image: Image.Image, boxes: Tensor, labels: Tensor, class_names: Sequence[str], scores: Tensor | None = None
) -> Image.Image:
    """The image, as RGB, with a box for each detection, its class name and its score in percent.

    `boxes`: left, top, right, bottom in pixels, (n, 4); `labels`: (n,), 1 for the first class; `scores`: (n,), from 0 to 1. The
    best detection is drawn on top. A class always has the same colour. Line width and font size grow with the image.
    """
    image = image.convert("RGB")
    if not len(boxes):
        return image
    boxes, labels = boxes.detach().cpu(), labels.cpu()
    texts = [escape(class_names[label - 1]) for label in labels.tolist()]
    order = list(range(len(boxes)))
    if scores is not None:
        texts = [f"{text} {100 * score:.0f}" for text, score in zip(texts, scores.tolist(), strict=True)]
        order = scores.detach().cpu().argsort(stable=True).tolist()
    texts = [texts[index] for index in order]
    boxes, colours = boxes[order], [class_colour(label) for label in labels[order].tolist()]
    size = max(11, min(image.size) // 32)
    line = max(1, size // 7)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    drawn: Image.Image = to_pil_image(draw_bounding_boxes(pixels, boxes, colors=list(colours), width=line))
    # Not with torchvision: it writes a label inside the box, where it hides small objects and is cut off at the border.
    canvas = ImageDraw.Draw(drawn)
    font = ImageFont.truetype(str(_FONT), size)
    for (left, top, _, _), text, colour in zip(boxes.tolist(), texts, colours, strict=True):
        _, _, width, height = canvas.textbbox((0, 0), text, font=font)
        x = max(0, min(left, image.width - width - 2 * line))
        y = max(0, top - height - 2 * line)
        canvas.rectangle((x, y, x + width + 2 * line, y + height + 2 * line), fill=colour)
        canvas.text((x + line, y + line), text, fill="black" if _is_bright(colour) else "white", font=font)
    return drawn


def class_colour(label: int) -> tuple[int, int, int]:
    """The colour of a class: red, green and blue from 0 to 255. Classes with adjacent labels have very different colours."""
    hue = label * 0.618034 % 1  # multiples of the golden ratio are spread evenly
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def _is_bright(colour: tuple[int, int, int]) -> bool:
    red, green, blue = colour
    return 0.299 * red + 0.587 * green + 0.114 * blue > 128  # luma of ITU-R BT.601
