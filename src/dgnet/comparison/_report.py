"""A comparison as a table, files, a picture and a page."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dgnet.analysis import COLOURS, ShownFigure, escape_text, save_figure
from dgnet.comparison._compare import Compared, Comparison
from dgnet.files import replace_file, to_json

NAME = "compare"
"""Of the files: compare.json, compare.csv, compare.png, compare.svg, compare.html."""

_MARKERS = {"static": "o", "dynamic": "^"}


def format_comparison(found: Comparison) -> str:
    """The comparison as a text table, with the conditions."""
    heads, rows = _table(found)
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    lines = []
    for row in (heads, *rows):
        padded = zip(row, widths, strict=True)
        cells = [cell.rjust(width) if column > 1 else cell.ljust(width) for column, (cell, width) in enumerate(padded)]
        lines.append("  ".join(cells))
    lines += [f"{name}: not compared: {why}" for name, why in found.failed.items()]
    return "\n".join([*lines, _conditions(found)])


def _table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells."""
    heads = ["network", "kind", _measure(found), "executed MAdds M", "of dense"]
    for timing in found.rows[0].timings:
        heads += [f"images/s at {timing.batch_size}", "form", "ratio", "p50 ms", "p95 ms"]
    rows = []
    for row in found.rows:
        cells = [row.name, row.kind, f"{row.accuracy:.2f}", f"{row.executed_multiply_adds / 1e6:.2f}"]
        cells.append(f"{row.executed_multiply_adds / row.dense_multiply_adds:.0%}")
        for timing in row.timings:
            cells += [
                f"{timing.images_per_second:,.0f}",
                timing.form,
                f"{timing.ratio:.2f}",
                f"{timing.p50_ms:.2f}",
                f"{timing.p95_ms:.2f}",
            ]
        rows.append(cells)
    return heads, rows


def _measure(found: Comparison) -> str:
    """What accuracy is, in percent."""
    return "AP %" if found.task == "detect" else "top-1 %"


def _conditions(found: Comparison) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    how = "folded and compiled" if found.compile else "folded and not compiled"
    if found.compile and found.device.startswith("cuda"):
        how += " (the dense mode under CUDA graphs)"
    if found.task == "detect":
        how = "neither folded nor compiled; multiply-adds of backbone and pyramid"
    return (
        f"{found.rows[0].images:,} images of {found.data}; networks {how}; medians of {found.rounds} alternating"
        f" rounds; ratio: to {found.rows[0].name}; {found.hardware}; {packages}"
    )


def find_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The Pareto front: of points (cost, accuracy) those that no other beats in one without losing in the other, by cost."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1]:
            front.append(index)
    return front


def draw_comparison(found: Comparison) -> Figure:
    """Accuracy over the time of a call and over executed multiply-adds. A line joins what no other network beats in both."""
    figure = ShownFigure(figsize=(9.0, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    batch = found.rows[0].timings[0].batch_size
    _draw(left, found.rows, [row.timings[0].p50_ms for row in found.rows])
    left.set(xlabel=f"median time of a call, batch {batch}, ms", ylabel=_measure(found))
    _draw(right, found.rows, [row.executed_multiply_adds / 1e6 for row in found.rows])
    right.set(xlabel="multiply-adds executed per image, mean, millions")
    return figure


def _draw(axes: Axes, rows: Sequence[Compared], costs: Sequence[float]) -> None:
    front = find_front([(cost, row.accuracy) for cost, row in zip(costs, rows, strict=True)])
    axes.plot([costs[index] for index in front], [rows[index].accuracy for index in front], color="0.75", linewidth=1, zorder=1)
    middle = (min(costs) + max(costs)) / 2
    for number, (row, cost) in enumerate(zip(rows, costs, strict=True)):
        axes.plot(cost, row.accuracy, _MARKERS[row.kind], color=COLOURS[number % len(COLOURS)], markersize=7, zorder=2)
        side = -1 if cost > middle else 1  # names point to the middle of the panel
        axes.annotate(
            escape_text(row.name),
            (cost, row.accuracy),
            (7 * side, 6),
            textcoords="offset points",
            ha="right" if side < 0 else "left",
            fontsize=7.5,
            color="0.15",
            zorder=3,
        )
    axes.margins(0.22, 0.18)
    axes.set_xlim(left=max(0, axes.get_xlim()[0]))
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)


def save_comparison(found: Comparison, folder: Path) -> list[Path]:
    """Write compare.json, compare.csv, compare.png, compare.svg and compare.html into `folder`; returns their paths."""
    pictures = save_figure(draw_comparison(found), folder, NAME)
    picture = pictures[1].read_text(encoding="utf-8")
    texts = {
        f"{NAME}.json": to_json(asdict(found), indent=2) + "\n",
        f"{NAME}.csv": _csv(found),
        f"{NAME}.html": _page(found, picture[picture.index("<svg") :]),
    }
    for name, text in texts.items():
        with replace_file(folder / name) as written:
            written.write_text(text, encoding="utf-8")
    return [*pictures, *(folder / name for name in texts)]


def _csv(found: Comparison) -> str:
    """One line for each network and batch size."""
    rows: list[dict[str, Any]] = []
    for row in found.rows:
        plain = asdict(row)
        timings = plain.pop("timings")
        percentiles = plain.pop("executed_percentiles")
        plain["image_size"] = "x".join(map(str, plain["image_size"]))
        plain |= {f"executed_p{percent}": value for percent, value in percentiles.items()}
        for timing in timings:
            flat = {name: value for name, value in timing.items() if not name.endswith("range")}
            for name in ("images_per_second_range", "ratio_range"):
                flat |= {f"{name}_low": timing[name][0], f"{name}_high": timing[name][1]}
            rows.append(plain | flat)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1a2026; --soft: #5c6770; --line: #dde2e6; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181b; --ink: #e6eaed; --soft: #9aa5ad; --line: #333b41; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } p { color: var(--soft); font-size: .9rem; }
.picture { background: #fff; border-radius: 8px; padding: .5rem; } svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th { color: var(--soft); font-weight: 600; }
"""


def _page(found: Comparison, picture: str) -> str:
    """A page that needs no other file."""
    heads, rows = _table(found)
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    failed = "".join(f"<p>{html.escape(name)}: not compared: {html.escape(why)}</p>" for name, why in found.failed.items())
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Comparison of {len(found.rows)} networks</title>
<style>{_STYLE}</style>
<h1>Accuracy against cost and time</h1>
<div class="picture">{picture}</div>
<p>○ static, △ dynamic. The line joins the networks that no other beats in both.</p>
<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
{failed}
<p>{html.escape(_conditions(found))}</p>
</html>
"""
