"""The paper's cost tables, compared with the costs that this code counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgnet._cost import cost
from dgnet.errors import UsageError, lookup
from dgnet.models import create_model


@dataclass(frozen=True)
class PaperCost:
    """The figures that the paper prints for one network; None if it prints none."""

    model: str
    params_m: float | None = None  # parameters in millions
    multiply_adds_m: float | None = None  # multiply-adds of convolutions in millions
    gflops: float | None = None  # twice the multiply-adds, in thousands of millions

    @property
    def params(self) -> int | None:
        """Parameters."""
        return None if self.params_m is None else round(self.params_m * 1e6)

    @property
    def multiply_adds(self) -> int | None:
        """Multiply-adds of convolutions."""
        if self.gflops is not None:
            return round(self.gflops * 1e9 / 2)
        return None if self.multiply_adds_m is None else round(self.multiply_adds_m * 1e6)


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper that compares costs."""

    rows: tuple[PaperCost, ...]
    image_size: tuple[int, int] = (224, 224)  # height, width in pixels
    in_gflops: bool = False
    note: str = ""


TABLES = {
    "1": PaperTable(
        (
            PaperCost("mobilenetv2_100", 3.51, 299),
            PaperCost("dg_mobilenetv2_100", 3.58, 312),
            PaperCost("resnet18", 11.69, 1813),
            PaperCost("dg_resnet18", 11.71, 1826),
            PaperCost("resnet50", 25.55, 4087),
            PaperCost("dg_resnet50", 25.62, 4125),
            PaperCost("resnet101", 44.54, 7799),
            PaperCost("dg_resnet101", 44.90, 7837),
            PaperCost("resnext50_32x4d", 25.02, 4228),
            PaperCost("dg_resnext50_32x4d", 25.09, 4305),
            PaperCost("regnetx_006", 6.19, 599),
            PaperCost("dg_regnetx_006", 6.22, 600),
            PaperCost("regnetx_016", 9.19, 1602),
            PaperCost("dg_regnetx_016", 9.22, 1604),
        )
    ),
    "2": PaperTable(
        (
            PaperCost("resnet50", gflops=174),
            PaperCost("dg_resnet50", gflops=176),
            PaperCost("resnet101", gflops=333),
            PaperCost("dg_resnet101", gflops=335),
            PaperCost("resnext50_32x4d", gflops=181),
            PaperCost("dg_resnext50_32x4d", gflops=183),
        ),
        image_size=(800, 1333),
        in_gflops=True,
    ),
    "4": PaperTable(
        (
            PaperCost("randwire_small_er", multiply_adds_m=602),
            PaperCost("randwire_small_ba", multiply_adds_m=582),
            PaperCost("randwire_small_ws", multiply_adds_m=572),
            PaperCost("dg_randwire_small", multiply_adds_m=611),
        ),
        note="Random graphs of seed 0. The paper's ER and BA seem swapped: over 30 seeds ER has 584 ± 8 M, BA always 602 M.",
    ),
    "5": PaperTable(
        (
            PaperCost("randwire_small_ws", 5.6, 583),
            PaperCost("efficientnet_b0", 5.3, 390),
            PaperCost("dg_regnetx_006", 6.2, 601),
            PaperCost("dg_regnety_006", 6.3, 601),
        ),
        note="DG-Net-A is dg_regnetx_006, DG-Net-B is dg_regnety_006. RandWire-WS is the graph of seed 0, the paper's is"
        " another graph. EfficientNet-B0's 390 M is its authors' figure, which counts more than convolutions.",
    ),
}


def cost_rows(
    models: Sequence[str] = (), image_size: tuple[int, int] | None = None, table: str | None = None
) -> list[dict[str, Any]]:
    """The cost of each model, with the figures of the paper's `table` if it has them for this size. Default: Table 1.

    `image_size`: height and width in pixels; by default the table's, or with `models` each model's own.
    Raises UsageError for an unknown model or table, or an invalid size.
    """
    if table is not None and models:
        raise UsageError(f"--table {table} has its own list of models; leave out {' '.join(models)}")
    of = lookup("--table", table or "1", TABLES)
    names = models or [row.model for row in of.rows]
    paper = {row.model: row for row in of.rows}
    rows = []
    for name in names:
        model = create_model(name)
        own: tuple[int, int] = tuple(model.pretrained_cfg["input_size"][1:])
        size = image_size or (own if models else of.image_size)
        printed = paper[name] if name in paper and size == of.image_size else PaperCost(name)
        rows.append(
            {
                "model": name,
                "image_size": list(size),
                **asdict(cost(model, size)),
                "paper_params": printed.params,
                "paper_multiply_adds": printed.multiply_adds,
            }
        )
    return rows


def format_cost_table(rows: Sequence[dict[str, Any]], table: str | None = None, markdown: bool = False) -> str:
    """`cost_rows` as a text or Markdown table, in the unit of the paper's `table`."""
    of = TABLES[table or "1"]
    scale, unit, digits = (2e-9, "GFLOPs", 1) if of.in_gflops else (1e-6, "MAdds M", 2)
    others = ("linear M", "router M", "aggregation M", "activations M")
    lines: list[Sequence[str]] = [("model", "size", "params M", "paper", "diff", unit, "paper", "diff", *others)]
    for row in rows:
        params, paper = row["paper_params"], row["paper_multiply_adds"]
        lines.append(
            (
                row["model"],
                "×".join(map(str, row["image_size"])),
                f"{row['params'] / 1e6:.3f}",
                f"{params / 1e6:.2f}" if params else "-",
                f"{100 * (row['params'] / params - 1):+.2f} %" if params else "-",
                f"{row['multiply_adds'] * scale:.{digits}f}",
                f"{paper * scale:.0f}" if paper else "-",
                f"{100 * (row['multiply_adds'] / paper - 1):+.2f} %" if paper else "-",
                f"{row['linear_multiply_adds'] / 1e6:.2f}",
                f"{row['router_multiply_adds'] / 1e6:.4f}",
                f"{row['aggregation_multiply_adds'] / 1e6:.2f}",
                f"{row['activations'] / 1e6:.2f}",
            )
        )
    if markdown:
        lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    counted = "GFLOPs: twice the multiply-adds" if of.in_gflops else "MAdds: multiply-adds"
    notes = [
        f"{counted} of convolutions, as the paper counts; one image, every edge open.",
        "linear: multiply-adds of linear layers and attention, routers left out.",
        of.note,
    ]
    return "\n".join([*text, "", *filter(None, notes)])
