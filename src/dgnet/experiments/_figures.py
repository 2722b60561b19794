"""Figures of a grid's finished runs: the accuracy of every run, and the training loss of every arm."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from dgnet.analysis import COLOURS, FORMATS, save_figure
from dgnet.experiments._grid import Grid
from dgnet.experiments._report import Arms, column, format_mean
from dgnet.files import writing

MOST_BELOW = 15.0
"""An arm more than this many points of top-1 below the median arm is not drawn; its value is printed at the edge."""
MOST_COLUMNS = 4  # panels in a row


def save_figures(grid: Grid, arms: Arms, formats: Sequence[str] = FORMATS[:2]) -> list[Path]:
    """Write GRID_accuracy and GRID_curves beside the grid's table, in each of `formats`; returns the paths.

    Raises UsageError if they cannot be written.
    """
    folder, name = grid.table.parent, grid.path.stem
    with writing(folder, "only the tables above were made"):
        folder.mkdir(parents=True, exist_ok=True)  # if all runs are those of other grids
        paths = save_figure(draw_accuracy(grid, arms), folder, f"{name}_accuracy", formats)
        curves = read_curves(grid, arms)
        if curves:
            paths += save_figure(draw_curves(grid, curves), folder, f"{name}_curves", formats)
    return paths


def draw_accuracy(grid: Grid, arms: Arms) -> Figure:
    """Top-1 of every run and the mean of every arm. An arm far below the others is shown as a number at the edge."""
    figure = Figure(figsize=(7, 0.8 + 0.45 * len(arms)), layout="constrained")
    axes = figure.subplots()
    names = list(arms)[::-1]
    reached = [column(arms[arm], "top1") for arm in names]
    lowest = statistics.median(map(statistics.fmean, reached)) - MOST_BELOW
    for height, values in enumerate(reached):
        mean = statistics.fmean(values)
        if mean < lowest:
            label = f"← {format_mean(values, 2)}"
            axes.text(0.01, height, label, va="center", transform=axes.get_yaxis_transform())
            continue
        axes.plot(values, [height] * len(values), "o", color=COLOURS[0], alpha=0.5, markersize=5)
        axes.plot([mean] * 2, [height - 0.3, height + 0.3], color=COLOURS[1], linewidth=2)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.set_yticks(range(len(names)), [f"{arm} ({len(arms[arm])})" for arm in names])
    axes.set_xlabel(f"{grid.evaluated} top-1, %; dot: one seed, bar: mean")
    axes.grid(axis="x", alpha=0.3)
    return figure


Curves = dict[str, dict[int, list[float]]]
"""For each trained arm, the training losses of its seeds by epoch."""


def read_curves(grid: Grid, arms: Arms) -> Curves:
    """The training curves of `arms`. Arms that only evaluate another arm's training in another way are left out."""
    evaluated = {run.arm for run in grid.runs if run.evaluation}
    digests = {(arm, row["digest"]) for arm, rows in arms.items() if arm not in evaluated for row in rows.values()}
    curves: Curves = {}
    for (arm, digest), rows in grid.read_curves().items():
        for row in rows:
            if (arm, digest) in digests:
                curves.setdefault(arm, {}).setdefault(int(row["epoch"]), []).append(float(row["train_loss"]))
    return curves


def draw_curves(grid: Grid, curves: Curves) -> Figure:
    """Training loss by epoch (Fig. 4): mean and range over seeds, one panel for each group."""
    groups: dict[str, list[str]] = {}
    for run in grid.runs:
        if run.arm in curves and run.arm not in groups.setdefault(run.group, []):
            groups[run.group].append(run.arm)
    groups = {group: names for group, names in groups.items() if names}
    columns = min(len(groups), MOST_COLUMNS)
    lines = math.ceil(len(groups) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, (group, names) in zip(panels.flat, groups.items(), strict=False):
        partners = [first for first, second in grid.compare if second in names and first not in names and first in curves]
        for number, arm in enumerate([*dict.fromkeys(partners), *names]):
            colour, style = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
            epochs = sorted(curves[arm])
            means = [statistics.fmean(curves[arm][epoch]) for epoch in epochs]
            axes.plot(epochs, means, style, color=colour, label=arm)
            lows, highs = ([bound(curves[arm][epoch]) for epoch in epochs] for bound in (min, max))
            axes.fill_between(epochs, lows, highs, color=colour, alpha=0.15)
        axes.set(title=group, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    for line in panels:
        line[0].set_ylabel("training loss")
    return figure
