from __future__ import annotations

import torch
from torch import Tensor

from dgnet.graph import global_average_pool
from dgnet.graph._pooling import ValidArea

SIZES = [(40, 64), (64, 33), (1, 50)]


def crops(feature: Tensor) -> list[Tensor]:
    """The valid part of each image, pixel by pixel: those whose top left corner lies in the image."""
    stride = 64 // feature.shape[2]
    parts = []
    for (height, width), image in zip(SIZES, feature, strict=True):
        rows = [row for row in range(feature.shape[2]) if row * stride < height]
        columns = [column for column in range(feature.shape[3]) if column * stride < width]
        parts.append(image[None][:, :, rows][:, :, :, columns])
    return parts


def test_the_valid_part_of_a_map_is_what_strides_leave_of_the_image():
    area = ValidArea(SIZES, (64, 64))
    for side in (64, 32, 8, 2):
        feature = torch.rand(3, 5, side, side) + 1
        masked = feature * area.mask(feature)
        for image, part in zip(masked, crops(feature), strict=True):
            height, width = part.shape[2:]
            torch.testing.assert_close(image[None, :, :height, :width], part)
            assert (image != 0).sum() == part.numel()
        torch.testing.assert_close(area.share(feature), torch.tensor([part[0, 0].numel() / side**2 for part in crops(feature)]))


def test_pooling_is_that_of_each_images_part():
    feature = torch.randn(3, 5, 16, 16)
    area = ValidArea(SIZES, (64, 64))
    expected = torch.cat([part.mean((2, 3)) for part in crops(feature)])
    torch.testing.assert_close(area.pool(feature, global_average_pool), expected)
    torch.testing.assert_close(
        area.pool(feature, lambda x: x.amax((2, 3))), torch.cat([p.amax((2, 3)) for p in crops(feature)])
    )


def test_gathered_samples_keep_their_own_part():
    feature = torch.randn(3, 5, 16, 16)
    area = ValidArea(SIZES, (64, 64))
    expected = area.pool(feature, global_average_pool)
    selected = area.select(torch.tensor([0, 2]))
    torch.testing.assert_close(selected.pool(feature[[0, 2]], global_average_pool), expected[[0, 2]])
    twice = area.select(torch.tensor([0, 2])).select(torch.tensor([1]))
    torch.testing.assert_close(twice.pool(feature[[2]], global_average_pool), expected[[2]])
