from __future__ import annotations

import pytest
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


def test_the_pool_of_a_user_gets_the_whole_part_in_half_precision_too():
    """bfloat16 holds whole numbers to 256 only."""
    feature = torch.zeros(1, 2, 400, 400, dtype=torch.bfloat16)
    shapes = []

    def pool(part: Tensor) -> Tensor:
        shapes.append(tuple(part.shape[2:]))
        return part.amax((2, 3))

    ValidArea([(301, 302)], (400, 400)).pool(feature, pool)
    assert shapes == [(301, 302)]


@pytest.mark.parametrize("weighting", ["routed", "signed", "linear", "softmax"])
@torch.no_grad()
def test_routing_with_the_pool_of_a_user_stays_in_float32_under_autocast(tiny, weighting):
    network = tiny(weighting=weighting, router_pool=lambda feature: feature.amax((2, 3))).eval()
    alphas = []
    stage = network.stages[0]
    feature = torch.randn(2, 4, 8, 8)
    for is_mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            alphas.append(stage.weighting.predict(0, feature.bfloat16()))
            network(torch.randn(2, 3, 8, 8))
    assert alphas[1].dtype == torch.float32
    assert torch.equal(*alphas)
