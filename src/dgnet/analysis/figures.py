"""Pictures of connectivity: heat maps of edges (Fig. 5, 6), graphs of images (Fig. 7), classes, points, curves (Fig. 4).

Rows of a heat map are receiving nodes, columns sending nodes, as in an adjacency matrix (§3.4). Colours are told apart by all
kinds of colour vision, and darker means more in print.

Letters: B batch, N nodes of a stage, E edges of all stages, K classes, S sampled images.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dgnet.errors import UsageError, check_choice
from dgnet.files import replace_file
from dgnet.graph import Record, node_names

if TYPE_CHECKING:  # statistics run networks; who only draws need not wait for what that takes
    from dgnet.analysis.statistics import Edge

WEIGHTS, SIGNED, VALUES = "viridis_r", "PuOr_r", "cividis_r"
# Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv"
MOST_NAMES = 40
"""Classes that are named on an axis."""
MOST_COLOURS = len(COLOURS) * len(MARKERS) // 2
"""Classes that are told apart as points."""

_WIDTH = 7.0  # inches, two columns of a paper
_UNIT = 0.3  # inches from node to node of a graph
_NODE = 6.0  # points, radius of a node
_BEND = 0.45  # how far the arrow of an edge that passes nodes by bends, as a share of its length
_THICKEST = 1.9  # points, of the edge that weighs most
_FAINT = "#b0b0b0"
_ABOVE: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 8}
_SHOWN = {
    "mean": "mean weight of an edge",
    "std": "standard deviation of an edge's weight",
    "open": "images for which an edge is open, %",
}


class ShownFigure(Figure):
    """A figure that a notebook shows where it is the last value of a cell, without pyplot."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png", dpi=120)
        return content.getvalue()


def plot_adjacency(record: Record | Sequence[Tensor], show: str = "mean", image: int | None = None) -> Figure:
    """Heat maps of the edges, one a stage, as a matplotlib figure (Fig. 5 and 6).

    `record`: of `dgnet.record_connectivity`, or an adjacency for each stage, (N, N) or (B, N, N). `show`: "mean" or "std" of
    the weights over the recorded images, or "open", the share of images for which an edge is open. `image`: show the weights of
    this one instead.

    Raises UsageError for an unknown `show` and an image that was not recorded.
    """
    check_choice("show", show, _SHOWN)
    matrices, masks = _take(record)
    count = len(matrices[0])
    if image is not None:
        return draw_edges(
            [matrix[_check_image(image, count)] for matrix in matrices], masks, f"weight of an edge, image {image}"
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
    """The graphs of one image, one a stage, as a matplotlib figure (Fig. 7): arrows run from sending to receiving node.

    `record`: as for `plot_adjacency`; `image`: which of those recorded; `picture`: to be shown beside them, a PIL image, an
    (H, W, 3) array or a (3, H, W) tensor of values in [0, 1].

    Raises UsageError for an image that was not recorded.
    """
    matrices, masks = _take(record)
    row = GraphRow([matrix[_check_image(image, len(matrix))] for matrix in matrices], picture, f"image {image}")
    return draw_graphs([row], masks)


def _take(record: Record | Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """For each stage the adjacency, (B, N, N), and which edges exist, (N, N); all of them where that is not known."""
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
    """A heat map a stage of one number an edge, on one scale.

    `matrices`, `masks`: (N, N) a stage; `label`: what the colour is; `limits`: of the colours, by default the least and the
    largest number.
    """
    columns = min(len(matrices), 4)
    rows = math.ceil(len(matrices) / columns)
    figure = ShownFigure(figsize=(_WIDTH, 0.3 + rows * (_WIDTH / columns)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    values = torch.cat([matrix[mask] for matrix, mask in zip(matrices, masks, strict=True)])
    norm = _scale(values, limits)
    digits = 0 if limits == (0.0, 100.0) else 2 if norm.vmax and norm.vmax >= 0.2 else 3
    for stage, (axes, matrix, mask) in enumerate(zip(panels, matrices, masks, strict=False), start=1):
        names = node_names(len(mask))
        # The input node has no in-edge, the output node no out-edge.
        shown = np.ma.masked_array(matrix.numpy(), ~mask.numpy())[1:, :-1]
        axes.imshow(shown, cmap=WEIGHTS, norm=norm)
        axes.set_xticks(range(len(names) - 1), names[:-1])
        axes.set_yticks(range(len(names) - 1), names[1:])
        axes.set(title=f"stage {stage}", xlabel="sending node")
        size = _WIDTH / columns * 0.5 / (len(names) - 1) * 72 / (0.62 * (digits + 2 if digits else 3))  # that fits a cell
        if size >= 4.5:
            for row, column in mask[1:, :-1].nonzero().tolist():
                _write_cell(axes, row, column, f"{shown[row, column]:.{digits}f}", norm, min(size, 7.5))
        axes.spines[["top", "right"]].set_visible(False)
        _shrink_text(axes, 8 if len(names) <= 12 else 5)
        if (stage - 1) % columns == 0:
            axes.set_ylabel("receiving node", fontsize=8)
    for axes in panels[len(matrices) :]:  # left over in the last row
        axes.set_axis_off()
    _colour_bar(figure, norm, WEIGHTS, f"{label}; darker is more")
    return figure


@dataclass(frozen=True)
class GraphRow:
    """An image in a figure of graphs."""

    matrices: Sequence[Tensor]  # for each stage its adjacency, (N, N), 0 where an edge is closed
    picture: Any = None  # what imshow takes, or a (3, H, W) tensor
    caption: str = ""


def draw_graphs(rows: Sequence[GraphRow], masks: Sequence[Tensor], title: str = "") -> Figure:
    """A row an image: its picture, caption, and a graph a stage (Fig. 7). `masks`: which edges exist, (N, N) a stage.

    An edge's colour and width are its weight, on one scale for all rows; a closed edge is faint and dotted, a block that does
    not run faint. Edges that pass nodes by bend upwards to every second node, downwards to the others, so that nothing crosses
    an arrow's head.
    """
    sizes = [len(mask) for mask in masks]
    reach = _BEND * (max(sizes) - 1) / 2 + 0.35  # of the longest edge, in nodes
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
    norm = _scale(opened, None)
    largest = float(opened.abs().max()) if len(opened) else 1.0
    for number, (row, axes) in enumerate(zip(rows, panels, strict=True)):
        first = int(has_picture)
        if has_picture:
            axes[0].set_axis_off()
            if row.picture is not None:
                axes[0].imshow(_to_array(row.picture))
        axes[first].set_axis_off()
        axes[first].text(0, 0.5, plain(row.caption), fontsize=6.5, va="center", ha="left", linespacing=1.35)
        for stage, (panel, matrix, mask) in enumerate(zip(axes[first + 1 :], row.matrices, masks, strict=True), start=1):
            _draw_graph(panel, matrix, mask, norm, largest, f"image{number}-stage{stage}")
            panel.set(ylim=(-reach - 0.45, reach + 0.45), label=f"stage {stage}")  # one scale for all stages
            if number == 0:
                # Inside the axes: where these keep their aspect, the layout leaves no room for a title above them.
                panel.text((len(mask) - 1) / 2, reach, f"stage {stage}", **_ABOVE)
    if title:
        figure.suptitle(title, fontsize=9)
    handles = [
        Line2D([], [], color=matplotlib.colormaps[WEIGHTS](0.8), linewidth=2, label="open edge, left to right"),
        Line2D([], [], color=_FAINT, linewidth=0.8, linestyle=":", label="closed edge"),
        Line2D(
            [], [], color=_FAINT, marker="o", markersize=7, markerfacecolor="white", linestyle="none", label="block not run"
        ),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    _colour_bar(figure, norm, WEIGHTS, f"weight of an open edge (line width: 0 to {largest:.2f}); darker is more")
    return figure


def _draw_graph(axes: Axes, matrix: Tensor, mask: Tensor, norm: Normalize, largest: float, name: str) -> None:
    num_nodes = len(mask)
    colours = matplotlib.colormaps[WEIGHTS]
    for receiver, sender in mask.nonzero().tolist():
        weight = float(matrix[receiver, sender])
        bend = 0.0 if receiver == sender + 1 else _BEND if receiver % 2 else -_BEND
        width = _THICKEST * abs(weight) / largest
        arrow = FancyArrowPatch(
            (sender, 0),
            (receiver, 0),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=3.5 + 2 * width,
            shrinkA=_NODE,
            shrinkB=_NODE,
            linewidth=width if weight else 0.6,
            linestyle="-" if weight else ":",
            color=colours(norm(weight)) if weight else _FAINT,
            zorder=2 if weight else 1,
        )
        arrow.set_in_layout(False)  # the axes' limits hold it: asking every arrow for its size is slow
        arrow.set_gid(f"{name}-edge{sender}-{receiver}-{'open' if weight else 'closed'}")
        axes.add_patch(arrow)
    for node, text in enumerate(node_names(num_nodes)):
        runs = node in (0, num_nodes - 1) or bool(matrix[node].any())
        edge = "black" if runs else _FAINT
        axes.plot(
            node, 0, "o", markersize=2 * _NODE, markerfacecolor="white", markeredgecolor=edge, markeredgewidth=0.8, zorder=3
        )
        axes.text(node, 0, text, ha="center", va="center_baseline", fontsize=6, color=edge, zorder=4)
    axes.set(xlim=(-0.5, num_nodes - 0.5), aspect="equal")
    axes.set_axis_off()


def draw_class_means(differences: Tensor, names: Sequence[str], edges: Sequence[Edge], sizes: Sequence[int]) -> Figure:
    """For every class and edge, how far the class's mean weight is from that of all images, (K, E).

    `sizes`: nodes of each stage.
    """
    width = max(_WIDTH, 1.2 + 0.11 * len(edges))
    figure = ShownFigure(figsize=(width, 1.9 + 0.2 * min(len(names), MOST_NAMES)), layout="constrained")
    axes = figure.subplots()
    norm = CenteredNorm(0, max(float(differences.abs().max()), 1e-6))
    axes.imshow(differences.numpy(), cmap=SIGNED, norm=norm, aspect="auto", interpolation="nearest")
    _name_classes(axes.yaxis, names)
    nodes = {stage: node_names(size) for stage, size in enumerate(sizes, start=1)}
    labels = [f"{nodes[edge.stage][edge.sender]}→{nodes[edge.stage][edge.receiver]}" for edge in edges]
    axes.set_xticks(range(len(edges)), labels, rotation=90)
    _shrink_text(axes, 7 if len(edges) <= 80 else 5)
    axes.set_xlabel("edge", fontsize=8)
    starts = [place for place, edge in enumerate(edges) if not place or edge.stage != edges[place - 1].stage]
    for start, end in zip(starts, [*starts[1:], len(edges)], strict=True):
        axes.axvline(start - 0.5, color="black", linewidth=0.8)
        axes.text((start + end - 1) / 2, 1.01, f"stage {edges[start].stage}", transform=axes.get_xaxis_transform(), **_ABOVE)
    _colour_bar(figure, norm, SIGNED, "mean weight over the class's images − over all images; orange is more")
    return figure


def draw_class_distance(distance: Tensor, names: Sequence[str]) -> Figure:
    """How far the mean wirings of classes are apart, (K, K)."""
    side = max(3.6, 1.4 + 0.34 * min(len(names), MOST_NAMES) ** 0.9)
    figure = ShownFigure(figsize=(side, side + 0.5), layout="constrained")
    axes = figure.subplots()
    norm = Normalize(0, max(float(distance.max()), 1e-6))
    axes.imshow(distance.numpy(), cmap=WEIGHTS, norm=norm, interpolation="nearest")
    _name_classes(axes.xaxis, names)
    _name_classes(axes.yaxis, names)
    axes.tick_params(axis="x", rotation=90)
    _shrink_text(axes, 7)
    if len(names) <= 12:
        for row, column in (~torch.eye(len(names), dtype=torch.bool)).nonzero().tolist():
            _write_cell(axes, row, column, f"{distance[row, column]:.3f}".removeprefix("0"), norm, 5.5)
    _colour_bar(figure, norm, WEIGHTS, "RMS difference of the edges' mean weights;\ndarker is farther apart")
    return figure


def draw_points(
    points: Tensor, explained: Sequence[float], labels: Tensor, names: Sequence[str], values: Tensor, value_label: str
) -> Figure:
    """Images' wirings as points of the plane, (S, 2): by class where there are some and not too many, and by a number of each.

    `explained`: share of the wirings' variance along each axis; `labels`: (S,), negative where there is none.
    """
    shown = sorted({label for label in labels.tolist() if label >= 0})
    by_class = 2 <= len(shown) <= MOST_COLOURS
    figure = ShownFigure(figsize=(_WIDTH if by_class else _WIDTH / 2 + 0.5, 3.7), layout="constrained")
    panels = figure.subplots(1, 1 + by_class, squeeze=False, sharex=True, sharey=True)[0]
    size = max(2.0, min(16.0, 6000 / max(len(points), 1)))
    if by_class:
        for place, label in enumerate(shown):
            own = points[labels == label]
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[(place // len(COLOURS) + place) % len(MARKERS)]
            look: dict[str, Any] = {"color": colour, "marker": marker}
            panels[0].scatter(own[:, 0], own[:, 1], s=size, linewidths=0, alpha=0.5, **look)
            first, second = own.mean(0).tolist()
            panels[0].scatter(
                first, second, s=40, edgecolors="black", linewidths=0.7, zorder=3, label=plain(names[label]), **look
            )
        columns = min(len(shown), 5)
        figure.legend(loc="outside lower left", ncols=columns, fontsize=7, frameon=False, columnspacing=1)
        panels[0].set_title("class; large, with a black line: the mean of its images", fontsize=8)
    norm = _scale(values, None)
    panels[-1].scatter(points[:, 0], points[:, 1], s=size, c=values, cmap=VALUES, norm=norm, linewidths=0)
    figure.colorbar(ScalarMappable(norm, VALUES), ax=panels[-1]).ax.tick_params(labelsize=7)
    panels[-1].set_title(value_label, fontsize=8)
    for axes in panels:
        axes.set_xlabel(f"first component ({100 * explained[0]:.0f} % of the variance)", fontsize=7)
        _shrink_text(axes, 7)
    panels[0].set_ylabel(f"second component ({100 * explained[1]:.0f} %)", fontsize=7)
    return figure


@dataclass(frozen=True)
class Curve:
    """What a run measured by epoch, from 1."""

    name: str
    epochs: Sequence[int]
    train_loss: Sequence[float]
    evaluated: Sequence[int]  # epochs
    top1: Sequence[float]  # percent


def draw_curves(curves: Sequence[Curve]) -> Figure:
    """Training loss, and top-1 where it was evaluated more than once, by epoch, runs side by side (Fig. 4).

    The legend gives the last top-1.
    """
    columns = 1 + any(len(curve.evaluated) > 1 for curve in curves)
    figure = ShownFigure(figsize=(0.6 * _WIDTH if columns == 1 else _WIDTH, 2.9 + 0.16 * len(curves)), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for number, curve in enumerate(curves):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
            "marker": "o",
            "markersize": 3,
        }
        last = f", top-1 {curve.top1[-1]:.2f} %" if len(curve.top1) else ""
        panels[0].plot(curve.epochs, curve.train_loss, label=plain(curve.name) + last, **style)
        if columns == 2:
            panels[1].plot(curve.evaluated, curve.top1, **style)
    for axes, label in zip(panels, ("training loss", "evaluated top-1, %"), strict=False):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        _shrink_text(axes, 8)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and SVG, each whole or as it was; the SVG's text stays text."""
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": "dgnet", "svg.fonttype": "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # file names may hold what no font here has
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once: it is slow, and a second time would move things a little
        for ending in ("png", "svg"):
            path = folder / f"{name}.{ending}"
            with replace_file(path) as written:
                figure.savefig(written, format=ending, dpi=200, metadata={"Date": None} if ending == "svg" else None)
            paths.append(path)
    return paths


def _scale(values: Tensor, limits: tuple[float, float] | None) -> Normalize:
    """Colours from the least to the largest value; from 0 where they are all the same."""
    if limits is not None:
        return Normalize(*limits)
    if not len(values):
        return Normalize(0, 1)
    low, high = float(values.min()), float(values.max())
    return Normalize(low, high) if high - low > 1e-9 else Normalize(min(0.0, high), max(0.0, high) or 1.0)


def _write_cell(axes: Axes, row: int, column: int, text: str, norm: Normalize, size: float) -> None:
    """A number on its colour."""
    colour = "white" if norm(float(text)) > 0.5 else "black"
    axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size)


def _colour_bar(figure: Figure, norm: Normalize, colours: str, label: str) -> None:
    """One for all panels, below them."""
    place: dict[str, Any] = {"location": "bottom", "fraction": 0.06, "aspect": 40, "shrink": 0.6, "panchor": False}
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=figure.axes, **place)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _name_classes(axis: Any, names: Sequence[str]) -> None:
    if len(names) <= MOST_NAMES:
        axis.set_ticks(range(len(names)), [plain(shorten(name, 20)) for name in names])
    else:
        axis.set_label_text("class, in the order of its label", fontsize=8)


def shorten(text: str, length: int) -> str:
    """`text`, with … where it is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def plain(text: str) -> str:
    """`text` as it is drawn as it stands: matplotlib would set what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def _shrink_text(axes: Axes, size: float) -> None:
    axes.tick_params(labelsize=size)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_fontsize(8)


def _to_array(picture: Any) -> Any:
    if isinstance(picture, Tensor):
        return picture.detach().cpu().permute(1, 2, 0).clamp(0, 1).numpy()
    return picture
