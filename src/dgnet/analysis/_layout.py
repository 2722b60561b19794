"""The layout of a stage's graph, used by the figures, the explorer page and the explorer server.

Nodes lie on a horizontal line in their order, at equal gaps. An edge is an arc above the line, from left to right. Longer arcs
are higher and steeper, so that the arcs of one node do not overlap. N: nodes of the stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Arc:
    """An edge as a cubic Bézier curve. Its control points lie `reach` further inwards than its two nodes, and `rise` higher."""

    sender: int
    receiver: int
    reach: float  # in gaps between nodes
    rise: float  # in heights of the whole graph; 0 between neighbouring nodes

    def points(self, gap: float, height: float, radius: float) -> list[tuple[float, float]]:
        """(x, y) of start, both control points and end, with node 0 at (0, 0) and y pointing upwards.

        Start and end lie on circles of `radius` around the two nodes. `gap`, `height`: the units of `reach` and `rise`.
        """
        left, right = gap * self.sender, gap * self.receiver
        reach, rise = gap * self.reach, height * self.rise
        length = math.hypot(reach, rise)
        x, y = radius * reach / length, radius * rise / length
        return [(left + x, y), (left + reach, rise), (right - reach, rise), (right - x, y)]


def lay_out(mask: Tensor) -> list[Arc]:
    """The arcs of a stage's edges, in the order of the receiving nodes; `mask`: (N, N), which edges exist."""
    return [_bend(sender, receiver, len(mask)) for receiver, sender in mask.nonzero().tolist()]


def _bend(sender: int, receiver: int, num_nodes: int) -> Arc:
    span = receiver - sender
    rise = 1.3 * ((span - 1) / max(1, num_nodes - 2)) ** 0.75
    reach = span * (0.4 - 0.3 * max(0, span - 2) / max(1, num_nodes - 3))
    return Arc(sender, receiver, reach, rise)


def find_running_nodes(matrix: Tensor) -> list[bool]:
    """Whether each node runs: the input node, the output node, and every block with an open in-edge; `matrix`: (N, N)."""
    last = len(matrix) - 1
    return [node in (0, last) or bool(matrix[node].any()) for node in range(last + 1)]
