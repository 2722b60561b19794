"""The paper's cost tables, printed beside what this code counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dgnet.cost import cost
from dgnet.models import create_model


@dataclass(frozen=True)
class PaperCost:
    """What Table 1 prints for one network: parameters in millions, multiply-adds of convolutions in millions."""

    params_m: float
    multiply_adds_m: float


TABLE_1 = {
    "resnet18": PaperCost(11.69, 1813),
    "dg_resnet18": PaperCost(11.71, 1826),
    "resnet50": PaperCost(25.55, 4087),
    "dg_resnet50": PaperCost(25.62, 4125),
}


def cost_rows(models: Sequence[str] = (), image_size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """The cost of each model at `image_size` (height, width) or its own size; by default of Table 1's networks.

    Raises UsageError for an unknown model or a size that makes no sense.
    """
    rows = []
    for name in models or TABLE_1:
        model = create_model(name)
        size = image_size or tuple(model.pretrained_cfg["input_size"][1:])  # type: ignore[index]
        rows.append({"model": name, "image_size": list(size), **asdict(cost(model, size))})
    return rows


def format_cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """A text table; the paper's figures stand where Table 1 has the model and the size is its 224×224."""
    header = ("model", "size", "params M", "paper", "MAdds M", "paper", "diff", "router M", "aggregation M", "activations M")
    lines = [header]
    for row in rows:
        paper = TABLE_1.get(row["model"]) if row["image_size"] == [224, 224] else None
        millions = {name: value / 1e6 for name, value in row.items() if isinstance(value, int)}
        lines.append(
            (
                row["model"],
                "×".join(map(str, row["image_size"])),
                f"{millions['params']:.3f}",
                f"{paper.params_m:.2f}" if paper else "-",
                f"{millions['multiply_adds']:.2f}",
                f"{paper.multiply_adds_m:.0f}" if paper else "-",
                f"{100 * (millions['multiply_adds'] / paper.multiply_adds_m - 1):+.2f} %" if paper else "-",
                f"{millions['router_multiply_adds']:.4f}",
                f"{millions['aggregation_multiply_adds']:.2f}",
                f"{millions['activations']:.2f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*text, "", "MAdds: multiply-adds of convolutions, as the paper counts; one image, every edge open."])
