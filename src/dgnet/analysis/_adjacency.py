"""Adjacency matrices as pictures: heat maps of edges (Fig. 5, 6) and graphs of images (Fig. 7).

Rows of a heat map are receiving nodes, columns sending nodes, as in an adjacency matrix (§3.4).

Letters: B batch, N nodes of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.path import Path as MplPath
from torch import Tensor

from dgnet.analysis._figures import (
    ABOVE,
    WIDTH,
    ShownFigure,
    WeightColours,
    add_colour_bar,
    escape_text,
    shrink_text,
    write_cell,
)
from dgnet.analysis._layout import Arc, find_running_nodes, lay_out
from dgnet.errors import UsageError, check_choice
from dgnet.graph import Record, node_names

_UNIT = 0.3  # inches between neighbouring nodes of a graph
_NODE = 6.0  # points, radius of a node
_TALL = 0.225  # height of a stage's graph above the nodes (and below), as a share of its length
_THICKEST = 1.9  # points, line width of the edge with the largest weight
_FAINT = "#b0b0b0"
_SHOWN = {
    "mean": "mean weight of an edge",
    "std": "standard deviation of an edge's weight",
    "open": "images for which an edge is open, %",
}


def plot_adjacency(record: Record | Sequence[Tensor], show: str = "mean", image: int | None = None) -> Figure:
    """Heat maps of the edges, one for each stage, as a matplotlib figure (Fig. 5 and 6).

    `record`: from `dgnet.record_connectivity`, or an adjacency for each stage, (N, N) or (B, N, N). `show`: "mean" or "std" of
    the weights over the recorded images, or "open", the share of images for which an edge is open. `image`: the index of one
    recorded image; if given, its weights are shown instead.

    Raises UsageError for an unknown `show` and for an image that was not recorded.
    """
    check_choice("show", show, _SHOWN)
    matrices, masks = _to_matrices(record)
    count = len(matrices[0])
    if image is not None:
        return draw_edges(
            [matrix[_check_image(image, len(matrix))] for matrix in matrices], masks, f"weight of an edge, image {image}"
        )
    moments = {
        "mean": lambda matrix: matrix.mean(0),
        "std": lambda matrix: matrix.std(0, correction=0),
        "open": lambda matrix: 100 * (matrix != 0).double().mean(0),
    }
    label = f"{_SHOWN[show]} ({count:,} image{'s' * (count != 1)})"
    limits = (0.0, 100.0) if show == "open" else None
    return draw_edges([moments[show](matrix) for matrix in matrices], masks, label, limits)


def plot_graph(record: Record | Sequence[Tensor], image: int = 0, picture: Any = None) -> Figure:
    """The graphs of one image, one for each stage, as a matplotlib figure (Fig. 7). Arrows point to the receiving node.

    `record`: as for `plot_adjacency`; `image`: index of a recorded image; `picture`: the picture to show beside the graphs: a
    PIL image, an (H, W, 3) array or a (3, H, W) tensor of values in [0, 1].

    Raises UsageError for an image that was not recorded.
    """
    matrices, masks = _to_matrices(record)
    row = GraphRow([matrix[_check_image(image, len(matrix))] for matrix in matrices], picture, f"image {image}")
    return draw_graphs([row], masks)


def _to_matrices(record: Record | Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For each stage the adjacency, (B, N, N), and which edges exist, (N, N). Without a `Record`, all edges exist."""
    if isinstance(record, Record):
        return [matrix.cpu().double() for matrix in record.adjacency], [topology.mask for topology in record.topology]
    matrices = [matrix.detach().cpu().double() for matrix in record]
    if not matrices or any(m.ndim not in (2, 3) or m.shape[-1] != m.shape[-2] or not m.numel() for m in matrices):
        raise UsageError(
            f"expected an adjacency, (N, N) or (B, N, N), for each stage, got {[tuple(m.shape) for m in matrices]}"
        )
    matrices = [matrix if matrix.ndim == 3 else matrix[None] for matrix in matrices]
    return matrices, [torch.ones(matrix.shape[1:], dtype=torch.bool).tril(-1) for matrix in matrices]


def _check_image(image: int, count: int) -> int:
    if not 0 <= image < count:
        raise UsageError(f"image {image} was not recorded: the record holds {count}, 0 to {count - 1}")
    return image


def draw_edges(
    matrices: Sequence[Tensor], masks: Sequence[Tensor], label: str, limits: tuple[float, float] | None = None
) -> Figure:
    """One heat map for each stage. All share one colour scale.

    `matrices`, `masks`: (N, N) for each stage; `label`: what the colours mean; `limits`: range of the colour scale, by default
    the smallest and the largest value.
    """
    columns = min(len(matrices), 4)
    rows = math.ceil(len(matrices) / columns)
    figure = ShownFigure(figsize=(WIDTH, 0.3 + rows * (WIDTH / columns)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    values = torch.cat([matrix[mask] for matrix, mask in zip(matrices, masks, strict=True)])
    colours = WeightColours.of(values, limits)
    digits = 0 if limits == (0.0, 100.0) else 2 if colours.norm.vmax and colours.norm.vmax >= 0.2 else 3
    for stage, (axes, matrix, mask) in enumerate(zip(panels, matrices, masks, strict=False), start=1):
        names = node_names(len(mask))
        # The input node has no in-edges and the output node no out-edges: skip this row and this column.
        shown = np.ma.masked_array(matrix.numpy(), ~mask.numpy())[1:, :-1]
        axes.imshow(shown, cmap=colours.name, norm=colours.norm)
        axes.set_xticks(range(len(names) - 1), names[:-1])
        axes.set_yticks(range(len(names) - 1), names[1:])
        axes.set(title=f"stage {stage}", xlabel="sending node")
        size = WIDTH / columns * 0.5 / (len(names) - 1) * 72 / (0.62 * (digits + 2 if digits else 3))  # fits into a cell
        if size >= 4.5:
            for row, column in mask[1:, :-1].nonzero().tolist():
                colour = colours(shown[row, column])
                write_cell(axes, row, column, f"{shown[row, column]:.{digits}f}", colour, min(size, 7.5))
        axes.spines[["top", "right"]].set_visible(False)
        shrink_text(axes, 8 if len(names) <= 12 else 5)
        if (stage - 1) % columns == 0:
            axes.set_ylabel("receiving node", fontsize=8)
    for axes in panels[len(matrices) :]:  # unused panels in the last row
        axes.set_axis_off()
    add_colour_bar(figure, colours.norm, colours.name, f"{label}; {colours.meaning}")
    return figure


@dataclass(frozen=True)
class GraphRow:
    """One image (one row) in a figure of graphs."""

    matrices: Sequence[Tensor]  # for each stage the adjacency, (N, N), 0 where an edge is closed
    picture: Any = None  # anything that imshow accepts, or a (3, H, W) tensor
    caption: str = ""


def draw_graphs(rows: Sequence[GraphRow], masks: Sequence[Tensor], title: str = "") -> Figure:
    """One row for each image: its picture, its caption, and one graph for each stage (Fig. 7).

    `masks`: which edges exist, (N, N) for each stage. Colour and width of an edge show its weight, on one scale for all rows.
    A closed edge is faint and dotted; a block that does not run is faint. Arcs to every second node are drawn below the nodes,
    so that fewer arcs overlap.
    """
    sizes = [len(mask) for mask in masks]
    reach = _TALL * (max(sizes) - 1) + 0.35  # height of the highest arc, in gaps between nodes
    height = max(_UNIT * (2 * reach + 0.9), 0.95)
    has_picture = any(row.picture is not None for row in rows)
    left = (0.95 if has_picture else 0.0, 1.45)  # inches of picture and caption
    figure = ShownFigure(
        figsize=(sum(left) + _UNIT * sum(sizes) + 0.3, height * len(rows) + 1.15 + 0.25 * bool(title)),
        layout=ConstrainedLayoutEngine(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0),
    )
    ratios = [*(width / _UNIT for width in left if width), *sizes]
    panels = figure.subplots(len(rows), len(ratios), squeeze=False, width_ratios=ratios)
    values = torch.cat([matrix[mask] for row in rows for matrix, mask in zip(row.matrices, masks, strict=True)])
    opened = values[values != 0]
    colours = WeightColours.of(opened)
    largest = float(opened.abs().max()) if len(opened) else 1.0
    for number, (row, axes) in enumerate(zip(rows, panels, strict=True)):
        first = int(has_picture)
        if has_picture:
            axes[0].set_axis_off()
            if row.picture is not None:
                axes[0].imshow(_to_array(row.picture))
        axes[first].set_axis_off()
        axes[first].text(0, 0.5, escape_text(row.caption), fontsize=6.5, va="center", ha="left", linespacing=1.35)
        for stage, (panel, matrix, mask) in enumerate(zip(axes[first + 1 :], row.matrices, masks, strict=True), start=1):
            _draw_graph(panel, matrix, mask, colours, largest, f"image{number}-stage{stage}")
            panel.set(ylim=(-reach - 0.45, reach + 0.45), label=f"stage {stage}")  # the same scale for all stages
            if number == 0:
                # Text inside the axes: the layout leaves no room for a title above axes with a fixed aspect ratio.
                panel.text((len(mask) - 1) / 2, reach, f"stage {stage}", **ABOVE)
    if title:
        figure.suptitle(title, fontsize=9)
    handles = [
        Line2D([], [], color=colours.line(largest), linewidth=2, label="open edge, left to right"),
        Line2D([], [], color=_FAINT, linewidth=0.8, linestyle=":", label="closed edge"),
        Line2D(
            [], [], color=_FAINT, marker="o", markersize=7, markerfacecolor="white", linestyle="none", label="block not run"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    label = f"weight of an open edge (line width: 0 to {largest:.2f}); {colours.meaning}"
    add_colour_bar(figure, colours.norm, colours.name, label)
    return figure


@dataclass(frozen=True)
class _Connection:
    """An arc as a connection style of matplotlib's arrows: called with the positions of the two nodes in pixels."""

    arc: Arc
    height: float  # of the graph, in gaps between nodes; negative: below the nodes

    def __call__(self, start: Any, end: Any, *, shrinkA: float, shrinkB: float, **patches: Any) -> MplPath:  # noqa: N803
        gap = (end[0] - start[0]) / (self.arc.receiver - self.arc.sender)
        points = np.array(self.arc.points(gap, gap * self.height, shrinkA))
        points += (start[0] - gap * self.arc.sender, start[1])
        return MplPath(points, [MplPath.MOVETO, MplPath.CURVE4, MplPath.CURVE4, MplPath.CURVE4])


def _draw_graph(axes: Axes, matrix: Tensor, mask: Tensor, colours: WeightColours, largest: float, name: str) -> None:
    num_nodes = len(mask)
    for arc in lay_out(mask):
        sender, receiver, weight = arc.sender, arc.receiver, float(matrix[arc.receiver, arc.sender])
        width = _THICKEST * abs(weight) / largest
        height = _TALL * (num_nodes - 1) * (-1 if receiver % 2 else 1)
        arrow = FancyArrowPatch(
            (sender, 0),
            (receiver, 0),
            connectionstyle=_Connection(arc, height),  # type: ignore[arg-type]  # matplotlib accepts any callable
            arrowstyle="-|>",
            mutation_scale=3.5 + 2 * width,
            shrinkA=_NODE,
            shrinkB=_NODE,
            linewidth=max(width, 0.4) if weight else 0.6,
            linestyle="-" if weight else ":",
            color=colours.line(weight) if weight else _FAINT,
            zorder=2 if weight else 1,
        )
        arrow.set_in_layout(False)  # the axes' limits contain it; measuring every arrow is slow
        arrow.set_gid(f"{name}-edge{sender}-{receiver}-{'open' if weight else 'closed'}")
        axes.add_patch(arrow)
    for node, (text, runs) in enumerate(zip(node_names(num_nodes), find_running_nodes(matrix), strict=True)):
        edge = "black" if runs else _FAINT
        axes.plot(
            node, 0, "o", markersize=2 * _NODE, markerfacecolor="white", markeredgecolor=edge, markeredgewidth=0.8, zorder=3
        )
        axes.text(node, 0, text, ha="center", va="center_baseline", fontsize=6, color=edge, zorder=4)
    axes.set(xlim=(-0.5, num_nodes - 0.5), aspect="equal")
    axes.set_axis_off()


def _to_array(picture: Any) -> Any:
    if isinstance(picture, Tensor):
        return picture.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    return picture
