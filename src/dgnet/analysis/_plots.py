"""Figures of statistics: classes, images as points in the plane, and curves of runs (Fig. 4).

Letters: E edges of all stages, K classes, S sampled images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from dgnet.analysis._figures import (
    ABOVE,
    COLOURS,
    SIGNED,
    VALUES,
    WEIGHTS,
    WIDTH,
    ShownFigure,
    add_colour_bar,
    escape_text,
    scale,
    shorten,
    shrink_text,
    write_cell,
)
from dgnet.graph import node_names

if TYPE_CHECKING:  # importing statistics is slow, and drawing needs only this type
    from dgnet.analysis._statistics import Edge

MARKERS = "os^Dv"
MOST_NAMES = 40
"""Most classes with their names on an axis."""
MOST_COLOURS = len(COLOURS) * len(MARKERS) // 2
"""Most classes that get a colour and marker of their own."""


def draw_class_means(differences: Tensor, names: Sequence[str], edges: Sequence[Edge], sizes: Sequence[int]) -> Figure:
    """For every class and edge, the class's mean weight minus the mean weight over all images.

    `differences`: (K, E); `sizes`: number of nodes of each stage.
    """
    width = max(WIDTH, 1.2 + 0.11 * len(edges))
    figure = ShownFigure(figsize=(width, 1.9 + 0.2 * min(len(names), MOST_NAMES)), layout="constrained")
    axes = figure.subplots()
    norm = CenteredNorm(0, max(float(differences.abs().max()), 1e-6))
    axes.imshow(differences.numpy(), cmap=SIGNED, norm=norm, aspect="auto", interpolation="nearest")
    _name_classes(axes.yaxis, names)
    nodes = {stage: node_names(size) for stage, size in enumerate(sizes, start=1)}
    labels = [f"{nodes[edge.stage][edge.sender]}→{nodes[edge.stage][edge.receiver]}" for edge in edges]
    axes.set_xticks(range(len(edges)), labels, rotation=90)
    shrink_text(axes, 7 if len(edges) <= 80 else 5)
    axes.set_xlabel("edge", fontsize=8)
    starts = [place for place, edge in enumerate(edges) if not place or edge.stage != edges[place - 1].stage]
    for start, end in zip(starts, [*starts[1:], len(edges)], strict=True):
        axes.axvline(start - 0.5, color="black", linewidth=0.8)
        axes.text((start + end - 1) / 2, 1.01, f"stage {edges[start].stage}", transform=axes.get_xaxis_transform(), **ABOVE)
    add_colour_bar(figure, norm, SIGNED, "mean weight over the class's images − over all images; orange is more")
    return figure


def draw_class_distance(distance: Tensor, names: Sequence[str]) -> Figure:
    """The distances between the classes' mean wirings, (K, K)."""
    side = max(3.6, 1.4 + 0.34 * min(len(names), MOST_NAMES) ** 0.9)
    figure = ShownFigure(figsize=(side, side + 0.5), layout="constrained")
    axes = figure.subplots()
    norm = Normalize(0, max(float(distance.max()), 1e-6))
    axes.imshow(distance.numpy(), cmap=WEIGHTS, norm=norm, interpolation="nearest")
    _name_classes(axes.xaxis, names)
    _name_classes(axes.yaxis, names)
    axes.tick_params(axis="x", rotation=90)
    shrink_text(axes, 7)
    if len(names) <= 12:
        for row, column in (~torch.eye(len(names), dtype=torch.bool)).nonzero().tolist():
            ground: Any = matplotlib.colormaps[WEIGHTS](norm(distance[row, column]))
            write_cell(axes, row, column, f"{distance[row, column]:.3f}".removeprefix("0"), ground, 5.5)
    add_colour_bar(figure, norm, WEIGHTS, "RMS difference of the edges' mean weights;\ndarker is farther apart")
    return figure


def draw_points(
    points: Tensor, explained: Sequence[float], labels: Tensor, names: Sequence[str], values: Tensor, value_label: str
) -> Figure:
    """Images' wirings as points in the plane, (S, 2), coloured by `values`, (S,).

    With 2 to `MOST_COLOURS` classes, a second panel shows the points by class. `explained`: share of the wirings' variance
    along each axis; `labels`: (S,), negative without a label; `value_label`: title of the panel coloured by value.
    """
    shown = sorted({label for label in labels.tolist() if label >= 0})
    by_class = 2 <= len(shown) <= MOST_COLOURS
    figure = ShownFigure(figsize=(WIDTH if by_class else WIDTH / 2 + 0.5, 3.7), layout="constrained")
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
                first, second, s=40, edgecolors="black", linewidths=0.7, zorder=3, label=escape_text(names[label]), **look
            )
        columns = min(len(shown), 5)
        figure.legend(loc="outside lower left", ncols=columns, fontsize=7, frameon=False, columnspacing=1)
        panels[0].set_title("class; large marker with black outline: mean of the class", fontsize=8)
    norm = scale(values, None)
    panels[-1].scatter(points[:, 0], points[:, 1], s=size, c=values, cmap=VALUES, norm=norm, linewidths=0)
    figure.colorbar(ScalarMappable(norm, VALUES), ax=panels[-1]).ax.tick_params(labelsize=7)
    panels[-1].set_title(value_label, fontsize=8)
    for axes in panels:
        axes.set_xlabel(f"first component ({100 * explained[0]:.0f} % of the variance)", fontsize=7)
        shrink_text(axes, 7)
    panels[0].set_ylabel(f"second component ({100 * explained[1]:.0f} %)", fontsize=7)
    return figure


@dataclass(frozen=True)
class Curve:
    """A run's training loss and top-1 by epoch; epochs count from 1."""

    name: str
    epochs: Sequence[int]
    train_loss: Sequence[float]
    evaluated: Sequence[int]  # epochs
    top1: Sequence[float]  # percent


def draw_curves(curves: Sequence[Curve]) -> Figure:
    """Training loss by epoch for several runs (Fig. 4), and top-1 if a run evaluated it more than once.

    The legend gives the last top-1.
    """
    columns = 1 + any(len(curve.evaluated) > 1 for curve in curves)
    figure = ShownFigure(figsize=(0.6 * WIDTH if columns == 1 else WIDTH, 2.9 + 0.16 * len(curves)), layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for number, curve in enumerate(curves):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "linestyle": ("-", "--", ":")[number // len(COLOURS) % 3],
            "marker": "o",
            "markersize": 3,
        }
        last = f", top-1 {curve.top1[-1]:.2f} %" if len(curve.top1) else ""
        panels[0].plot(curve.epochs, curve.train_loss, label=escape_text(curve.name) + last, **style)
        if columns == 2:
            panels[1].plot(curve.evaluated, curve.top1, **style)
    for axes, label in zip(panels, ("training loss", "evaluated top-1, %"), strict=False):
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        shrink_text(axes, 8)
    figure.legend(loc="outside lower center", fontsize=7, frameon=False)
    return figure


def _name_classes(axis: Any, names: Sequence[str]) -> None:
    if len(names) <= MOST_NAMES:
        axis.set_ticks(range(len(names)), [escape_text(shorten(name, 20)) for name in names])
    else:
        axis.set_label_text("class, in the order of its label", fontsize=8)
