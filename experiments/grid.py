"""A grid of training runs as a YAML file: the runs it asks for, and the table of the finished ones."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dgnet.errors import UsageError, reason
from dgnet.files import read_table

KEYS = {"recipe", "data", "test", "options", "groups", "compare"}

RUN_OF = "$run:"
"""An option with this prefix names an arm: the option's value is the folder of that arm's run with the same seed."""

PLACES = ("data", "val_data", "data_root", "output", "threads")
"""Options that do not change the result: where the images are stored, but not which images they are (the grid names those)."""


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation: an arm of the grid with one seed."""

    group: str
    arm: str
    seed: int
    options: dict[str, Any]  # options of `dgnet train`, including those of the recipe
    evaluation: dict[str, Any]  # additional options of `dgnet evaluate`
    images: tuple[str | None, ...]  # the grid's `data` and `test`

    @property
    def digest(self) -> str:
        """A hash of the options that change the result; a run with other options is another run."""
        return _digest(self.training | ({"evaluate": self.evaluation} if self.evaluation else {}))

    @property
    def name(self) -> str:
        """The name of the training and of its run folder. Arms that differ only in their evaluation share it."""
        return f"{_digest(self.training)}-{self.options['model']}-seed{self.seed}"

    @property
    def needs(self) -> list[str]:
        """The arms whose runs of the same seed must be finished before this one."""
        values = (value for value in self.options.values() if isinstance(value, str))
        return [value.removeprefix(RUN_OF) for value in values if value.startswith(RUN_OF)]

    @property
    def training(self) -> dict[str, Any]:
        """The options that change the result of training."""
        return {name: value for name, value in self.options.items() if name not in PLACES} | {"images": self.images}


def _digest(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Grid:
    """The contents of a grid's YAML file."""

    path: Path
    runs: list[Run]
    compare: list[tuple[str, str]]
    data: str
    test: str | None  # None: runs are evaluated on held-out training images

    def find(self, arm: str, seed: int) -> Run:
        """The run of an arm with a seed. Raises UsageError if there is none."""
        for run in self.runs:
            if (run.arm, run.seed) == (arm, seed):
                return run
        raise UsageError(f"{self.path} has no arm {arm!r} with seed {seed}, which another arm names")

    @property
    def evaluated(self) -> str:
        """The images that accuracies refer to: "held-out" or "test"."""
        return "held-out" if self.test is None else "test"

    @property
    def table(self) -> Path:
        """The CSV file with one row for each finished run."""
        return self.path.parent / "results" / f"{self.path.stem}.csv"

    @property
    def curves(self) -> Path:
        """The CSV file with one row for each epoch of each finished run."""
        return self.path.parent / "results" / f"{self.path.stem}_curves.csv"


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. Raises UsageError if it cannot be read or is incomplete."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if unknown := sorted(set(values) - KEYS):
            raise ValueError(f"unknown key {unknown[0]!r}; keys: {', '.join(sorted(KEYS))}")
        shared = yaml.safe_load((path.parent / values["recipe"]).read_text(encoding="utf-8")) | values["options"]
        runs = [
            build_run(group, arm, seed, {**shared, **options}, (values["data"], values.get("test")))
            for group, part in values["groups"].items()
            for seed in part["seeds"]
            for arm, options in part["arms"].items()
        ]
        compare = [(str(first), str(second)) for first, second in values.get("compare", [])]
        grid = Grid(path, runs, compare, values["data"], values.get("test"))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path} is not a valid grid: {reason(error)}; see experiments/README.md") from None
    for run in runs:
        if (grid.test is None) != bool(run.options.get("holdout")):
            raise UsageError(
                f"{path}: arm {run.arm!r} needs either `test` in the grid or `holdout` among its options, not both"
            )
    arms = {run.arm for run in runs}
    for run in runs:
        for needed in run.needs:
            grid.find(needed, run.seed)
    for name in (name for pair in compare for name in pair):
        if name not in arms:
            raise UsageError(f"{path} compares {name!r}, which is not an arm; arms: {', '.join(sorted(arms))}")
    seen: dict[tuple[str, int], str] = {}
    for run in runs:
        if seen.setdefault((run.arm, run.seed), run.group) != run.group:
            raise UsageError(
                f"{path}: arm {run.arm!r} with seed {run.seed} is in two groups: {seen[run.arm, run.seed]}, {run.group}"
            )
    return grid


def build_run(group: str, arm: str, seed: int, options: dict[str, Any], images: tuple[str | None, ...]) -> Run:
    """A run with `options` (the arm's and the recipe's) and the grid's `images`."""
    evaluation = options.pop("evaluate", {})
    return Run(group, arm, seed, fill_seed({**options, "seed": seed}, seed), dict(evaluation), images)


def fill_seed(value: Any, seed: int) -> Any:
    """`value` with each "$seed" replaced by the run's seed, for example to give each run its own random graph."""
    if isinstance(value, dict):
        return {name: fill_seed(item, seed) for name, item in value.items()}
    return seed if value == "$seed" else value


def missing_runs(grid: Grid) -> list[Run]:
    """The runs that are not yet in the table, in the grid's order."""
    done = {(row["digest"], row["arm"]) for row in read_table(grid.table)}
    return [run for run in grid.runs if (run.digest, run.arm) not in done]
