"""Where the images, weights and runs of a grid are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dgnet.data import source_below
from dgnet.documents import read_yaml
from dgnet.errors import UsageError
from dgnet.experiments._grid import RUN_OF, Grid, GridRun
from dgnet.models import is_published
from dgnet.paths import expand, is_file, is_folder


@dataclass(frozen=True)
class Places:
    """Folders of this machine. Relative paths of a grid are below them; a folder that no path needs may be None."""

    output: Path  # for run folders and logs
    data: Path | None = None
    weights: Path | None = None  # by default that of `data`

    def folder(self, run: GridRun) -> Path:
        """The run folder. dgnet 0.2.0 and older versions gave a run that begins with another one another name: it is kept."""
        folder, old = self.output / run.name, self.output / run.unlinked.name
        return old if old != folder and not is_folder(folder) and self._began_alike(old, run) else folder

    def _began_alike(self, folder: Path, run: GridRun) -> bool:
        """Whether what is in `folder` began with the same runs as `run`: the names of their folders say with which options."""
        path = folder / "config.yaml"
        config = read_yaml(path) if is_file(path) else None
        return isinstance(config, dict) and all(
            Path(str(config.get(name))).name == self.folder(one).name for name, one in run.begins.items()
        )

    def options(self, grid: Grid, run: GridRun) -> dict[str, Any]:
        """The options of `dgnet train` for a run. Raises UsageError for a path whose folder is not given."""
        options = {**run.options, "output": str(self.folder(run)), "data": source_below(grid.data, self.data)}
        options["val_data"] = None if grid.test is None else source_below(grid.test, self.data)
        is_named = options["data"].partition("/")[0] in ("hfds", "torch")
        if is_named and self.data is not None and "data_root" not in options:
            options["data_root"] = str(self.data)
        if isinstance(options.get("weights"), str) and not options["weights"].startswith(RUN_OF):
            options["weights"] = self._find_weights(options["weights"])
        return options | {name: str(self.folder(one)) for name, one in run.begins.items()}

    def _find_weights(self, weights: str) -> str:
        folder = self.weights or self.data
        if expand(weights).is_absolute():
            return str(expand(weights))
        if is_published(weights):
            return weights
        if folder is None:
            raise UsageError(f"{weights} is a relative path; name the folder that holds it with --weights")
        return str(folder / weights)
