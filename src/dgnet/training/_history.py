"""metrics.csv: one row for each epoch; a resumed run continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from dgnet.files import read_table, write_table, writing


class MetricsFile(Logger):
    """Writes the whole file `path` again after each row. `step`: where a run continues; rows from there on are dropped."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = [] if step is None else [row for row in read_table(path) if int(row["step"]) < step]

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
