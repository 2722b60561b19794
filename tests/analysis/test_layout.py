"""The layout that figures and pages share."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from dgnet.analysis._layout import find_running_nodes, lay_out


@pytest.mark.parametrize("num_nodes", [2, 3, 4, 17])
def test_arcs_run_from_circle_to_circle_and_the_longer_the_higher_and_steeper(num_nodes):
    mask = torch.ones(num_nodes, num_nodes, dtype=torch.bool).tril(-1)
    arcs = lay_out(mask)
    assert [(arc.receiver, arc.sender) for arc in arcs] == [tuple(edge) for edge in mask.nonzero().tolist()]
    shapes = {}
    for arc in arcs:
        start, one, other, end = arc.points(gap=30, height=100, radius=8)
        assert math.dist(start, (30 * arc.sender, 0)) == pytest.approx(8)
        assert math.dist(end, (30 * arc.receiver, 0)) == pytest.approx(8)
        assert start[0] < one[0] <= other[0] < end[0]
        assert 0 <= start[1] <= one[1] == other[1]
        shapes[arc.receiver - arc.sender] = (arc.rise, math.atan2(arc.rise, arc.reach))
    heights, angles = zip(*(shapes[span] for span in sorted(shapes)), strict=True)
    assert heights[0] == 0
    for values in (heights, angles):
        assert all(low < high for low, high in pairwise(values))
    assert 0.75 * max(heights) <= 1  # the top of a cubic curve lies at three quarters of its control points


def test_a_block_runs_where_an_in_edge_is_open():
    matrix = torch.zeros(4, 4)
    matrix[2, 0] = -0.5
    assert find_running_nodes(matrix) == [True, False, True, True]
