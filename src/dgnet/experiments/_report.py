"""Tables of a grid's finished runs: mean, standard deviation, differences at the same seed, connectivity."""

from __future__ import annotations

import math
import statistics

from dgnet._extras import import_extra
from dgnet.errors import UsageError
from dgnet.experiments._grid import Grid

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


Arms = dict[str, dict[int, dict[str, str]]]
"""For each arm, in the grid's order, its rows by seed."""


def collect(grid: Grid) -> Arms:
    """The rows of the grid's finished runs. Rows whose options have changed since are left out."""
    rows = grid.read_finished(("epochs", "top1"))
    arms: Arms = {}
    for run in grid.runs:
        if (run.arm, run.digest) in rows:
            arms.setdefault(run.arm, {})[run.seed] = rows[run.arm, run.digest]
    return arms


def column(rows: dict[int, dict[str, str]], name: str) -> list[float]:
    """A column's numbers; empty cells are left out."""
    return [float(row[name]) for row in rows.values() if row.get(name)]


def format_report(grid: Grid, arms: Arms) -> str:
    """All tables of a grid as Markdown. Raises UsageError if no run is finished."""
    if not arms:
        raise UsageError(f"{grid.table} holds no finished run of {grid.path}; run: dgnet experiment run {grid.path}")
    return "\n\n".join([format_arms(grid, arms), format_differences(grid, arms), format_connectivity(arms)])


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
