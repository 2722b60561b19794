"""metrics.csv: one row an epoch, which goes on where a run goes on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dgnet.files import replace_file


class MetricsFile(Logger):
    """Writes `path` anew with each row. Rows after `step`, which a run that goes on writes again, are dropped."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = [] if step is None else [row for row in read_rows(path) if int(row["step"]) < step]

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
        columns = sorted({name for row in self.rows for name in row})
        with replace_file(self.path) as written, open(written, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """None: config.yaml holds them."""


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
