"""metrics.csv: one row for each epoch; a resumed run continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dgnet.errors import UsageError
from dgnet.files import read_table, write_table, writing
from dgnet.typed import read_word

FILE = "metrics.csv"
_COUNTS = ("epoch", "step")


def read_history(folder: Path) -> list[dict[str, float]]:
    """The rows of a run folder's metrics.csv: `epoch` and `step`, whole numbers from 0 on, and figures; without empty cells.

    There is no row if there is no file. Raises UsageError for a file that is no table of metrics.
    """
    path = folder / FILE
    rows = []
    for number, cells in enumerate(read_table(path, _COUNTS), start=1):
        where = f"{path}: row {number}"
        row: dict[str, float] = {name: _read_figure(cell, f"{where}: {name}") for name, cell in cells.items() if cell != ""}
        for name in _COUNTS:
            row[name] = read_word(int, cells.get(name, ""), f"{where}: {name}")
            if row[name] < 0:
                raise UsageError(f"{where}: {name} must be at least 0, got {row[name]}")
        rows.append(row)
    return rows


def _read_figure(cell: str, where: str) -> float:
    try:
        return float(cell)  # a loss may have diverged: nan and inf are figures, too
    except ValueError:
        raise UsageError(f"{where} must be a number, got {cell[:60]!r}") from None


class MetricsFile(Logger):
    """Writes a run folder's metrics.csv again after each row. `step`: where a run continues; rows from there on are dropped."""

    def __init__(self, folder: Path, step: int | None = None) -> None:
        super().__init__()
        self.path = folder / FILE
        self.rows: list[dict[str, Any]] = []
        if step is not None:
            kept = [row["step"] < step for row in read_history(folder)]
            self.rows = [row for row, is_kept in zip(read_table(self.path), kept, strict=True) if is_kept]

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> list[dict[str, Any]]:
        """The rows."""
        return self.rows

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if not any(name.startswith("train_") for name in metrics):
            return
        self.rows.append({**metrics, "epoch": int(metrics["epoch"]), "step": step})
        with writing(self.path, "then continue with --resume"):
            write_table(self.path, self.rows, sorted({name for row in self.rows for name in row}))

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: config.yaml holds them."""
