"""Tables and figures of a grid's finished runs: mean, standard deviation, differences at the same seed, curves.

python experiments/report.py experiments/cifar10.yaml     # prints Markdown, writes results/GRID_*.png and .svg
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

from dgnet._extras import import_extra
from dgnet.analysis._figures import COLOURS, save_figure
from dgnet.errors import UsageError
from dgnet.files import read_table, writing
from grid import Grid, read_grid

MOST_BELOW = 15.0
"""An arm more than this many points of top-1 below the median arm is not drawn; its value is printed at the edge."""
MOST_COLUMNS = 4  # panels in a row
MEASURES = {  # column: heading, digits
    "top1": ("{evaluated} top-1 %", 2),
    "train_top1": ("train top-1 %", 2),
    "train_loss": ("train loss", 4),
}
CONNECTIVITY = {
    "closed_edges": ("closed edges", 5),
    "skippable_nodes": ("skippable nodes", 5),
    "distinct_wirings": ("distinct wirings", 0),
    "weight_std": ("spread of a weight", 4),
    "top1_mean_adjacency": ("top-1, mean adjacency", 2),
    "top1_other_adjacency": ("top-1, another image's", 2),
}


def main() -> int:
    """Print the tables and draw the figures; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file")
    args = parser.parse_args()
    try:
        grid = read_grid(args.grid)
        arms = collect(grid)
        if not arms:
            raise UsageError(f"{grid.table} holds no finished run of {args.grid}; run python experiments/run.py {args.grid}")
        print("\n\n".join([format_arms(grid, arms), format_differences(grid, arms), format_connectivity(arms)]))
        with writing(grid.table.parent, "only the tables above were made"):
            save_figure(draw_accuracy(grid, arms), grid.table.parent, f"{args.grid.stem}_accuracy")
            curves = read_curves(grid, arms)
            if curves:
                save_figure(draw_curves(grid, curves), grid.table.parent, f"{args.grid.stem}_curves")
    except UsageError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    return 0


Arms = dict[str, dict[int, dict[str, str]]]
"""For each arm, in the grid's order, its rows by seed."""


def collect(grid: Grid) -> Arms:
    """The table's rows of the grid's runs. Rows whose options have changed since are left out."""
    rows = {(row["arm"], row["digest"]): row for row in read_table(grid.table)}
    arms: Arms = {}
    for run in grid.runs:
        if (run.arm, run.digest) in rows:
            arms.setdefault(run.arm, {})[run.seed] = rows[run.arm, run.digest]
    return arms


def column(rows: dict[int, dict[str, str]], name: str) -> list[float]:
    """A column's numbers; empty cells are left out."""
    return [float(row[name]) for row in rows.values() if row.get(name)]


def format_mean(values: list[float], digits: int) -> str:
    """Mean ± standard deviation; the value alone if all are equal; "–" if there are none."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):,.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.fmean(values):,.{digits}f}{spread}"


def format_table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_arms(grid: Grid, arms: Arms) -> str:
    """One row for each arm: cost, accuracy and training loss, as mean ± standard deviation over seeds."""
    measures = [head.format(evaluated=grid.evaluated) for head, _ in MEASURES.values()]
    heads = ["arm", "seeds", "epochs", "parameters", "multiply-adds M", *measures, "minutes"]
    lines = []
    for arm, rows in arms.items():
        epochs = next(iter(rows.values()))["epochs"]
        # The cost may differ between seeds: random graphs differ.
        cells = [arm, str(len(rows)), epochs, format_mean(column(rows, "parameters"), 0)]
        cells.append(format_mean([value / 1e6 for value in column(rows, "multiply_adds")], 2))
        cells += [format_mean(column(rows, name), digits) for name, (_, digits) in MEASURES.items()]
        lines.append([*cells, format_mean(column(rows, "minutes"), 1)])
    return format_table(heads, lines)


def difference(first: dict[int, dict[str, str]], second: dict[int, dict[str, str]]) -> tuple[int, float, float]:
    """Number of seeds that both arms have; mean of second − first in points of top-1; half of its 95 % interval (Student's t).

    Means are NaN without a common seed, and the interval is NaN with fewer than two.
    """
    seeds = sorted(first.keys() & second.keys())
    values = [float(second[seed]["top1"]) - float(first[seed]["top1"]) for seed in seeds]
    if len(values) < 2:
        return len(values), values[0] if values else math.nan, math.nan
    student = import_extra("scipy.stats", "the report of a grid").t
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return len(values), statistics.fmean(values), half


def format_differences(grid: Grid, arms: Arms) -> str:
    """One row for each comparison of the grid with at least one common seed."""
    lines = []
    for first, second in grid.compare:
        pairs, mean, half = difference(arms.get(first, {}), arms.get(second, {}))
        if not pairs:
            continue
        interval = "–" if math.isnan(half) else f"{mean - half:+.2f} … {mean + half:+.2f}"
        decided = "–" if math.isnan(half) else "no" if abs(mean) <= half else "yes"
        lines.append([f"{second} − {first}", str(pairs), f"{mean:+.2f}", interval, decided])
    return format_table(
        [f"difference in {grid.evaluated} top-1", "seeds", "mean, points", "95 % interval", "beyond the noise"], lines
    )


def format_connectivity(arms: Arms) -> str:
    """One row for each arm with dynamic stages: figures of its connectivity on the evaluated images."""
    lines = [
        [arm, *(format_mean(column(rows, name), digits) for name, (_, digits) in CONNECTIVITY.items())]
        for arm, rows in arms.items()
        if column(rows, "top1_mean_adjacency")
    ]
    return format_table(["arm", *(head for head, _ in CONNECTIVITY.values())], lines)


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
    for row in read_table(grid.curves):
        if (row["arm"], row["digest"]) in digests:
            curves.setdefault(row["arm"], {}).setdefault(int(row["epoch"]), []).append(float(row["train_loss"]))
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


if __name__ == "__main__":
    sys.exit(main())
