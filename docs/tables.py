"""Write the tables that come from committed rows into the pages: `make tables`.

In a page a table stands between `<!-- table: NAME -->` and `<!-- end of table -->`. `TABLES` says what makes it. Rows are those
of experiments/results, benchmarks/results, docs/costs.json and docs/costs_detection.json.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks")]

import aggregate  # noqa: E402
import early_gates  # noqa: E402
import networks  # noqa: E402
import sparse_mode  # noqa: E402
from common import read_rows  # noqa: E402
from dgnet._cost_tables import TABLES as PAPER_TABLES  # noqa: E402
from dgnet._cost_tables import format_cost_table  # noqa: E402
from dgnet.experiments import (  # noqa: E402
    Arms,
    collect,
    column,
    difference,
    format_mean,
    format_table,
    read_grid,
)
from dgnet.models import list_pretrained  # noqa: E402

MARKED = r"(?ms)^<!-- table: (\S+) -->\n.*?^<!-- end of table -->$"


def main() -> None:
    """Write the tables into all pages, and print the pages that have changed."""
    for path in sorted((ROOT / "docs").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        if (filled := fill(text)) != text:
            path.write_text(filled, encoding="utf-8")
            print(path.relative_to(ROOT))


def fill(text: str) -> str:
    """The text of a page with its tables made again. Raises KeyError for a table that is not in `TABLES`."""
    return re.sub(MARKED, lambda found: f"<!-- table: {found[1]} -->\n{make(found[1])}\n<!-- end of table -->", text)


def make(name: str) -> str:
    """The Markdown of a table, with all columns but the first aligned to the right."""
    head, line, *rows = TABLES[name]().splitlines()
    return "\n".join([head, f"| --- |{' ---: |' * (line.count('|') - 2)}", *rows])


Rows = dict[int, dict[str, str]]
"""An arm's rows by seed."""


def mean(name: str, digits: int, scale: float = 1, spread: bool = True) -> Callable[[Rows], str]:
    """A cell: mean ± standard deviation over seeds of the column `name`, or the mean alone; – without values."""

    def format_cell(rows: Rows) -> str:
        values = [scale * value for value in column(rows, name)]
        return format_mean(values if spread or not values else [statistics.fmean(values)], digits)

    return format_cell


def spread_of_weights(rows: Rows) -> str:
    """A cell: the mean standard deviation of a weight; – if weights do not depend on the image."""
    return mean("weight_std", 3, spread=False)(rows) if any(column(rows, "weight_std")) else "–"


def share(name: str, digits: int) -> Callable[[Rows], str]:
    """A cell: a share in percent."""
    return mean(name, digits, scale=100)


SEEDS = ("seeds", lambda rows: str(len(rows)))
COST = [("parameters", mean("parameters", 0)), ("multiply-adds M", mean("multiply_adds", 2, 1e-6))]
TRAINED = ("train top-1 %", mean("train_top1", 2))
SKIPPED = ("blocks skipped %", share("skippable_nodes", 1))
CONTROLS = [
    ("top-1, mean adjacency", mean("top1_mean_adjacency", 2)),
    ("top-1, another image's", mean("top1_other_adjacency", 2)),
]
ACCURACY = [("test top-1 %", mean("top1", 2)), TRAINED]
MEASURED = [*ACCURACY, ("spread of a weight", spread_of_weights), *CONTROLS]


def signed(value: float, half: float = float("nan")) -> tuple[str, str]:
    """A difference, and its 95 % interval from half its width; – if that is not a number."""
    interval = "–" if half != half else f"{value - half:+.2f} … {value + half:+.2f}"
    return f"{value:+.2f}".replace("-", "−"), interval.replace("-", "−")


@cache
def read_arms(grid: str) -> Arms:
    """The finished runs of a grid in experiments/."""
    return collect(read_grid(ROOT / "experiments" / f"{grid}.yaml"))


def arms_table(grid: str, arms: dict[str, str] | None, columns: Sequence[tuple[str, Callable[[Rows], str]]]) -> str:
    """A row for each arm of the grid; `arms`: its name in the grid -> its name in the table, None: all with their own names."""
    rows = read_arms(grid)
    arms = {arm: arm for arm in rows} if arms is None else arms
    heads = ["network", *(head for head, _ in columns)]
    return format_table(heads, [[name, *(cell(rows[arm]) for _, cell in columns)] for arm, name in arms.items() if arm in rows])


def differences_table(grid: str, pairs: dict[str, tuple[str, str]]) -> str:
    """A row for each pair of arms; `pairs`: name in the table -> the arms (first, second), of which second − first is shown."""
    arms = read_arms(grid)
    lines = []
    for name, (first, second) in pairs.items():
        seeds, value, half = difference(arms.get(first, {}), arms.get(second, {}))
        if seeds:
            lines.append([name, str(seeds), *signed(value, half)])
    return format_table(["difference of the same seed", "seeds", "mean, points", "95 % interval"], lines)


def comparisons_table(grid: str) -> str:
    """The differences that a grid itself asks for, of which at least one seed is there."""
    pairs = read_grid(ROOT / "experiments" / f"{grid}.yaml").compare
    return differences_table(grid, {f"{second} − {first}": (first, second) for first, second in pairs})


GRID = {
    "resnet20": "resnet20, bf16",
    "dg_resnet20": "dg_resnet20, bf16",
    "complete × fixed, float32": "complete × fixed, float32",
    "complete × learned, float32": "complete × learned (α), float32",
    "complete × routed, float32": "complete × routed (DG), float32",
    "resnet32, float32": "resnet32, float32, 3 epochs",
    "dg_resnet32, float32": "dg_resnet32, float32, 3 epochs",
    "resnet56": "resnet56, bf16, GPU",
    "dg_resnet56": "dg_resnet56, bf16, GPU",
    "resnet56, complete × fixed": "resnet56, complete × fixed, bf16, GPU",
}
GRID_PAIRS = {
    "dg_resnet20 − resnet20": ("resnet20", "dg_resnet20"),
    "learned − fixed": ("complete × fixed, float32", "complete × learned, float32"),
    "routed − fixed": ("complete × fixed, float32", "complete × routed, float32"),
    "routed − learned": ("complete × learned, float32", "complete × routed, float32"),
    "dg_resnet32 − resnet32": ("resnet32, float32", "dg_resnet32, float32"),
    "resnet56: fixed − static": ("resnet56", "resnet56, complete × fixed"),
    "resnet56: routed − static": ("resnet56", "dg_resnet56"),
}
RANDWIRE = {
    "RandWire-ER": "71.34 ± 0.40, 602",
    "RandWire-BA": "71.16 ± 0.34, 582",
    "RandWire-WS": "72.26 ± 0.27, 572",
    "DG-Net on RandWire's nodes": "73.52 ± 0.05, 611",
    "DG-Net, starting at ER's graphs": "–",
    "RandWire-ER's graphs, routed": "–",
}
"""Arm -> what the paper's Table 4 has for it."""
RANDWIRE_PAIRS = {
    "DG-Net − RandWire-ER": ("RandWire-ER", "DG-Net on RandWire's nodes"),
    "DG-Net − RandWire-BA": ("RandWire-BA", "DG-Net on RandWire's nodes"),
    "DG-Net − RandWire-WS": ("RandWire-WS", "DG-Net on RandWire's nodes"),
    "DG-Net starting at ER's graphs − DG-Net": ("DG-Net on RandWire's nodes", "DG-Net, starting at ER's graphs"),
    "DG-Net starting at ER's graphs − RandWire-ER": ("RandWire-ER", "DG-Net, starting at ER's graphs"),
    "ER's graphs: routed − learned": ("RandWire-ER", "RandWire-ER's graphs, routed"),
}


def randwire_table() -> str:
    """DG-Net and RandWire on CIFAR-10, and the paper's Table 4."""
    paper = {id(read_arms("cifar10")[arm]): printed for arm, printed in RANDWIRE.items()}
    columns = [SEEDS, *COST, *ACCURACY, *CONTROLS]
    columns.append(("paper, ImageNet: top-1 %, M", lambda rows: paper[id(rows)]))
    return arms_table("cifar10", {arm: arm for arm in RANDWIRE}, columns)


CHOICES = {
    "dg_resnet20": "dg_resnet20: bias +3, ψ, learned τ, shortcut as edge",
    "raw α at inference": "raw α at inference (Eq. 5)",
    "budget 0.6, gumbel": "budget 0.6, gumbel gates",
    "budget 0.6, hard": "budget 0.6, hard gates",
}
"""Arm -> its name in the table, where it is another one."""


def choices_table() -> str:
    """One change each from dg_resnet20, on held-out images."""
    arms = read_arms("cifar10_choices")
    usual = arms["dg_resnet20"]

    def against(rows: Rows) -> str:
        compared = rows is not usual and "budget" not in next(iter(rows.values()))["group"]
        return "{} ({})".format(*signed(*difference(usual, rows)[1:])) if compared else "–"

    columns = [
        SEEDS,
        ("held-out top-1 %", mean("top1", 2)),
        ("against dg_resnet20, same seed (95 % interval)", against),
        TRAINED,
    ]
    columns += [("train loss", mean("train_loss", 3, spread=False)), ("spread of a weight", spread_of_weights), *CONTROLS]
    return arms_table("cifar10_choices", {arm: CHOICES.get(arm, arm) for arm in arms}, columns)


BUDGETS = {
    "resnet32, float32": "resnet32",
    "dg_resnet32, float32": "dg_resnet32",
    "dg_resnet32, budget 0.8": "budget 0.8",
    "dg_resnet32, budget 0.6": "budget 0.6",
    "dg_resnet32, budget 0.4": "budget 0.4",
}


def budget_table(seed: int = 10) -> str:
    """Accuracy and executed multiply-adds of networks with a budget, one seed."""
    rows = {name: read_arms("cifar10")[arm][seed] for arm, name in BUDGETS.items()}
    static = float(rows["resnet32"]["top1"])
    lines = []
    for name, row in rows.items():
        is_static = name == "resnet32"
        executed, spread = (float(row[key] or 0) / 1e6 for key in ("executed_multiply_adds", "executed_std"))
        dense = float(row["dense_multiply_adds"] or row["multiply_adds"]) / 1e6
        cost = f"{executed:.2f}{f' ± {spread:.2f}' if spread > 0.005 else ''} ({executed / dense:.3f})"
        skipped = float(row["skippable_nodes"])
        lines.append(
            [
                name,
                f"{float(row['top1']):.2f}",
                "–" if is_static else signed(float(row["top1"]) - static)[0],
                f"{dense:.2f} (1)" if is_static else cost,
                "–" if is_static else f"{skipped:.2f}" if skipped else "0",
                f"{int(row['distinct_wirings']):,}",
                *(f"{float(row[key]):.2f}" if row[key] else "–" for key in ("top1_mean_adjacency", "top1_other_adjacency")),
            ]
        )
    heads = [
        "network",
        "test top-1 %",
        "against static",
        "executed multiply-adds M (share)",
        "blocks skipped",
        "distinct wirings",
    ]
    return format_table([*heads, *(head for head, _ in CONTROLS)], lines)


def speed_table(name: str) -> str:
    """Images/s of networks with a budget, a column for each batch size. `name`: of a file in benchmarks/results."""
    rows = read_rows(ROOT / "benchmarks" / "results" / f"{name}.json")
    batches = sorted({row["batch_size"] for row in rows})
    found = {(row["model"], row["batch_size"]): row for row in rows}

    def cell(row: dict[str, Any]) -> str:
        speed = f"{row['images_per_second']:,.0f}"
        low, high = row["ratio_range"]
        return speed if low == high == 1 else f"{speed} ({row['ratio']:.2f}, {low:.2f} … {high:.2f})"

    names = dict.fromkeys(row["model"] for row in rows)
    lines = [[name.removeprefix("dg_resnet32, "), *(cell(found[name, batch]) for batch in batches)] for name in names]
    return format_table(["network", f"batch {batches[0]}", *map(str, batches[1:])], lines)


CONVERT_PAIRS = {
    "routed, budget 0.65 − static": ("static", "routed, budget 0.65"),
    "routed, budget 0.65 − static with fewer blocks": ("static with fewer blocks", "routed, budget 0.65"),
    "routed − SkipNet form, both at 0.65": ("SkipNet form, budget 0.65", "routed, budget 0.65"),
}
FURTHER_CONVERT_PAIRS = {
    "routed, without a budget − static": ("static", "routed"),
    "routed, budget 0.8 − static": ("static", "routed, budget 0.8"),
    "distilled − not, routed at 0.65": ("routed, budget 0.65", "routed, budget 0.65, distilled"),
    "distilled − not, static with fewer blocks": ("static with fewer blocks", "static with fewer blocks, distilled"),
}


def convert_table(grid: str) -> str:
    """The finished runs of a grid of converted networks, such as experiments/convert.yaml."""
    executed = [("executed of dense %", executed_share), SKIPPED]
    dense = ("dense multiply-adds M", mean("dense_multiply_adds", 2, 1e-6))  # also of products, as transformers have
    columns = [SEEDS, COST[0], dense, *ACCURACY, *executed, *CONTROLS]
    return arms_table(grid, None, columns)


def executed(rows: Rows) -> str:
    """A cell: executed multiply-adds in millions. Rows of older versions lack them for static networks, which execute all."""
    counts = [float(row["executed_multiply_adds"] or row["multiply_adds"]) for row in rows.values()]
    return format_mean([statistics.fmean(counts) / 1e6], 2)


def executed_share(rows: Rows) -> str:
    """A cell: executed multiply-adds as a share of the dense ones, in percent."""
    shares = [100 * float(row["executed_multiply_adds"]) / float(row["dense_multiply_adds"]) for row in rows.values()]
    return format_mean(shares, 1)


def networks_table(title: str) -> str:
    """DG-Net against static networks: the table of benchmarks/networks.py with this title."""
    tables = networks.format_tables(read_rows(ROOT / "benchmarks" / "results" / "networks_cpu.json"))
    named = dict(re.findall(r"^### (.*)\n\n((?:\|.*\n)+)", tables, re.MULTILINE))
    return str(named[title]).strip()


def benchmark_table(format_rows: Callable[[list[dict[str, Any]]], str], name: str) -> str:
    """The table of a benchmark from its file of rows."""
    return format_rows(read_rows(ROOT / "benchmarks" / "results" / f"{name}.json"))


def without_last_column(table: str) -> str:
    """A Markdown table without its last column."""
    return re.sub(r"(?m)\|[^|\n]*\|$", "|", table)


@cache
def read_costs(name: str) -> dict[str, dict[str, Any]]:
    """The recorded cost of each network."""
    return {row["model"]: row for row in json.loads((ROOT / "docs" / f"{name}.json").read_text(encoding="utf-8"))}


def paper_costs_table(table: str) -> str:
    """The cost of the networks in one of the paper's tables, beside the paper's figures."""
    recorded = read_costs("costs_detection" if table == "2" else "costs")
    rows = [
        recorded[row.model] | {"paper_params": row.params, "paper_multiply_adds": row.multiply_adds}
        for row in PAPER_TABLES[table].rows
    ]
    return format_cost_table(rows, table, markdown=True)


def costs_table() -> str:
    """The cost of every network of dgnet at its own image size."""
    fields = {
        "params": "params M",
        "multiply_adds": "MAdds M",
        "linear_multiply_adds": "linear M",
        "router_multiply_adds": "router M",
        "aggregation_multiply_adds": "aggregation M",
        "activations": "activations M",
    }
    digits = {"params": 3, "router_multiply_adds": 4}
    lines = [
        [
            f"`{name}`",
            "×".join(map(str, row["image_size"])),
            *(f"{row[key] / 1e6:.{digits.get(key, 2)}f}" for key in fields),
        ]
        for name, row in read_costs("costs").items()
    ]
    return format_table(["model", "size", *fields.values()], lines)


def pretrained_table() -> str:
    """The networks whose weights come with the package."""
    head = ["network", "images", "top-1 %", "parameters M", "multiply-adds M, dense", "executed, mean"]
    rows = [
        [
            f"`{row.name}`",
            f"{row.images:,}",
            f"{row.top1:.2f}",
            f"{row.parameters / 1e6:.3f}",
            f"{row.dense_multiply_adds / 1e6:.2f}",
            f"{row.executed_multiply_adds / 1e6:.2f} ({row.executed_multiply_adds / row.dense_multiply_adds:.0%})",
        ]
        for row in list_pretrained()
    ]
    return format_table(head, rows)


PEERS = [SEEDS, COST[0], ("executed multiply-adds M", executed), *ACCURACY, SKIPPED, *CONTROLS]

TABLES: dict[str, Callable[[], str]] = {
    "pretrained": pretrained_table,
    "cifar10": partial(arms_table, "cifar10", GRID, [SEEDS, *COST, *MEASURED]),
    "cifar10-differences": partial(differences_table, "cifar10", GRID_PAIRS),
    "randwire": randwire_table,
    "randwire-differences": partial(differences_table, "cifar10", RANDWIRE_PAIRS),
    "choices": choices_table,
    "weightings": partial(arms_table, "weightings", None, [SEEDS, COST[0], *MEASURED]),
    "weightings-differences": partial(comparisons_table, "weightings"),
    "weightings-objects": partial(arms_table, "weightings_objects", None, [SEEDS, COST[0], *MEASURED]),
    "weightings-objects-differences": partial(comparisons_table, "weightings_objects"),
    "weightings-randwire": partial(arms_table, "weightings_randwire", None, [SEEDS, COST[0], *MEASURED]),
    "weightings-randwire-differences": partial(comparisons_table, "weightings_randwire"),
    "peers": partial(arms_table, "peers", None, PEERS),
    "peers-differences": partial(comparisons_table, "peers"),
    "budget": budget_table,
    "budget-speed": partial(speed_table, "budget_cpu"),
    "convert": partial(convert_table, "convert"),
    "convert-differences": partial(differences_table, "convert", CONVERT_PAIRS | FURTHER_CONVERT_PAIRS),
    "convert-vit": partial(convert_table, "convert_vit"),
    "convert-vit-differences": partial(differences_table, "convert_vit", CONVERT_PAIRS),
    "convert-speed": partial(speed_table, "convert_cpu"),
    "train-bfloat16-compiled": partial(networks_table, "train, batch 32, bfloat16, compiled"),
    "train-bfloat16-compiled-system": partial(networks_table, "train, batch 32, bfloat16, compiled, allocator system"),
    "infer-1-bfloat16-compiled": partial(networks_table, "infer, batch 1, bfloat16, compiled"),
    "infer-64-bfloat16-compiled": partial(networks_table, "infer, batch 64, bfloat16, compiled"),
    "train-float32-eager": partial(networks_table, "train, batch 32, float32, eager"),
    "train-float32-compiled": partial(networks_table, "train, batch 32, float32, compiled"),
    "aggregate-cpu": partial(benchmark_table, aggregate.format_table, "aggregate_cpu"),
    "aggregate-eager-cpu": partial(benchmark_table, aggregate.format_table, "aggregate_eager_cpu"),
    "aggregate-cuda": partial(benchmark_table, aggregate.format_table, "aggregate_cuda"),
    "early-gates-cpu": partial(benchmark_table, early_gates.format_table, "early_gates_cpu"),
    "sparse-cpu": partial(benchmark_table, sparse_mode.format_table, "sparse_cpu"),
    "sparse-cuda": lambda: without_last_column(benchmark_table(sparse_mode.format_table, "sparse_cuda")),
    "costs": costs_table,
    **{f"costs-{table}": partial(paper_costs_table, table) for table in PAPER_TABLES},
}

if __name__ == "__main__":
    main()
