"""The graphs of a network's stages as SVG, for the explorer server's page."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dgnet.analysis._layout import find_running_nodes, lay_out
from dgnet.graph import node_names


def draw_path(adjacency: Sequence[Tensor], masks: Sequence[Tensor]) -> str:
    """HTML with one SVG graph for each stage.

    Arcs run from left to right. Their width and opacity show the weight; closed edges are dotted.
    `adjacency`: for each stage (N, N), 0 where an edge is closed; `masks`: for each stage (N, N), which edges exist.
    """
    largest = max((float(matrix.abs().max()) for matrix in adjacency), default=1.0) or 1.0
    return "".join(
        _draw_stage(number, matrix, mask, largest)
        for number, (matrix, mask) in enumerate(zip(adjacency, masks, strict=True), start=1)
    )


def _draw_stage(number: int, matrix: Tensor, mask: Tensor, largest: float) -> str:
    last, width = len(mask) - 1, 640
    gap = (width - 40) / last
    radius = min(11.0, 0.32 * gap)
    tallest = min(150.0, 30.0 * last)
    base = tallest + 16
    names = node_names(len(mask))
    parts = []
    for arc in lay_out(mask):
        weight = float(matrix[arc.receiver, arc.sender])
        start, *rest = (f"{20 + x:.1f} {base - y:.1f}" for x, y in arc.points(gap, tallest, radius))
        share = abs(weight) / largest
        style = (
            f'stroke-width="{0.6 + 3.2 * share:.2f}" opacity="{0.35 + 0.65 * share:.2f}" marker-end="url(#arrow)"'
            if weight
            else 'stroke-width="1" opacity="0.35" stroke-dasharray="2 4"'
        )
        label = f"{names[arc.sender]} to {names[arc.receiver]}: {f'weight {weight:.2f}' if weight else 'closed'}"
        parts.append(f'<path d="M{start}C{" ".join(rest)}" {style}><title>{label}</title></path>')
    for node, (name, runs) in enumerate(zip(names, find_running_nodes(matrix), strict=True)):
        x = 20 + node * gap
        dashes = "" if runs else ' stroke-dasharray="3 3" opacity="0.6"'
        parts.append(f'<circle cx="{x:.1f}" cy="{base:.1f}" r="{radius:.1f}" stroke-width="1.5"{dashes}/>')
        if radius >= 8 or node in (0, last):
            y = base + 4 if radius >= 8 else base + radius + 12
            parts.append(
                f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-size="11" fill="currentColor" stroke="none">'
                f"{name}</text>"
            )
    title = f"Stage {number}: {int((matrix != 0).sum())} of {int(mask.sum())} edges open"
    arrow = (
        '<marker id="arrow" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="7" markerHeight="7" orient="auto"'
        ' markerUnits="userSpaceOnUse"><path d="M0 0L6 3L0 6Z" fill="currentColor" stroke="none"/></marker>'
    )
    return (
        f'<p>{title}</p><svg role="img" aria-label="{title}" viewBox="0 0 {width} {base + 28:.0f}" style="width: 100%"'
        f' fill="none" stroke="currentColor"><defs>{arrow}</defs>{"".join(parts)}</svg>'
    )
