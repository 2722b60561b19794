"""A grid of training runs as a YAML file: the runs it asks for, and the table of the finished ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from dgnet.data import is_shards
from dgnet.documents import read_yaml
from dgnet.errors import UsageError, check_range, did_you_mean
from dgnet.files import read_table
from dgnet.training import TrainConfig
from dgnet.typed import Location, read_entry, read_value

KEYS = ("like", "recipe", "data", "test", "options", "groups", "compare", "reuse")
_GROUP_KEYS = ("seeds", "arms")

RUN_OF = "$run:"
"""An option with this prefix names an arm: the option's value is the folder of that arm's run with the same seed."""

PLACES = ("data", "val_data", "data_root", "output", "threads", "imports")
"""Options that do not change the result: where images and code are, but not which images (the grid names those)."""

_SET = {"data": "`data`", "val_data": "`test`", "seed": "`seeds` of a group", "output": "--output"}
"""Options that no arm can have, and what says them instead."""


@dataclass(frozen=True)
class GridRun:
    """One training run and its evaluation: an arm of the grid with one seed."""

    group: str
    arm: str
    seed: int
    options: dict[str, Any]  # options of `dgnet train`, including those of the recipe
    evaluation: dict[str, Any]  # additional options of `dgnet evaluate`
    images: tuple[str | None, ...]  # the grid's `data` and `test`
    begins: Mapping[str, GridRun] = field(default_factory=dict)  # by option: the runs of the same seed that `$run:` names

    @property
    def digest(self) -> str:
        """A hash of the options that change the result; a run with other options is another run."""
        return _digest(self.training | ({"evaluate": self.evaluation} if self.evaluation else {}))

    @property
    def name(self) -> str:
        """The name of the training and of its run folder. Arms that differ only in their evaluation share it."""
        return f"{_digest(self.training)}-{self.options['model']}-seed{self.seed}"

    @property
    def unlinked(self) -> GridRun:
        """The run as dgnet 0.2.0 and older versions knew it: other options of the runs that it begins with do not change it.

        Its digest and name are those of their tables and folders. They are the run's own if it begins with no other run.
        """
        return replace(self, begins={})

    @property
    def training(self) -> dict[str, Any]:
        """The options that change the result of training, with a hash of the trainings that it begins with."""
        own = {name: value for name, value in self.options.items() if name not in PLACES} | {"images": self.images}
        return own | {name: f"{RUN_OF}{_digest(run.training)}" for name, run in self.begins.items()}


def _digest(options: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:12]


def _find_needs(options: Mapping[str, Any]) -> dict[str, str]:
    """The options that name another arm's run, with the arm."""
    words = {name: value for name, value in options.items() if isinstance(value, str) and value.startswith(RUN_OF)}
    return {name: value.removeprefix(RUN_OF) for name, value in words.items()}


_Rows = dict[tuple[str, str], list[dict[str, str]]]
"""Rows of a table by arm and digest."""


@dataclass(frozen=True)
class Grid:
    """The contents of a grid's YAML file."""

    path: Path
    runs: list[GridRun]  # each after those that it begins with, otherwise in the order of the file
    compare: list[tuple[str, str]]
    data: str
    test: str | None  # None: runs are evaluated on held-out training images, or on those that `data` has for it
    reuse: tuple[Path, ...] = ()  # other grids, whose finished runs count here too

    @property
    def groups(self) -> list[str]:
        """The names of the groups, in order."""
        return list(dict.fromkeys(run.group for run in self.runs))

    def find(self, arm: str, seed: int) -> GridRun:
        """The run of an arm with a seed. Raises UsageError if there is none."""
        for run in self.runs:
            if (run.arm, run.seed) == (arm, seed):
                return run
        raise UsageError(f"{self.path} has no arm {arm!r} with seed {seed}, which another arm names")

    @property
    def evaluated(self) -> str:
        """The images that accuracies refer to: "test", "held-out", or "evaluation" for those that `data` itself has."""
        if self.test is not None:
            return "test"
        return "held-out" if any(run.options.get("holdout") for run in self.runs) else "evaluation"

    @property
    def table(self) -> Path:
        """The CSV file with one row for each finished run."""
        return _table_of(self.path)

    @property
    def curves(self) -> Path:
        """The CSV file with one row for each epoch of each finished run."""
        return _curves_of(self.path)

    def read_finished(self, columns: Sequence[str] = ()) -> dict[tuple[str, str], dict[str, str]]:
        """The row of each finished run of the grid, by arm and digest; `columns`: what the rows must have."""
        return {run: rows[-1] for run, rows in self._read(_table_of, columns).items()}

    def read_curves(self) -> _Rows:
        """The rows of `curves` of each finished run of the grid."""
        return self._read(_curves_of, ("epoch", "train_loss"))

    def _read(self, file_of: Callable[[Path], Path], columns: Sequence[str]) -> _Rows:
        """The rows of each of the grid's runs, from its own table or from that of the first grid in `reuse` that has them."""
        own = _read_rows(file_of(self.path), columns)
        others: dict[str, list[dict[str, str]]] = {}  # by digest: an arm may have another name there
        for path in self.reuse:
            for (_, digest), rows in _read_rows(file_of(path), columns).items():
                others.setdefault(digest, rows)
        found: _Rows = {}
        for run in self.runs:
            key, old = (run.arm, run.digest), (run.arm, run.unlinked.digest)
            if key in own:
                found[key] = own[key]
            # Rows that dgnet 0.2.0 and older versions wrote: their digest does not say which options the arms had that the run
            # began with. They count if these arms are finished, and their rows here have always had the present options.
            elif old in own and all(
                (one.arm, one.digest) in found and _digests_of(one, own) <= {one.digest, one.unlinked.digest}
                for one in run.begins.values()
            ):
                found[key] = [{**row, "digest": run.digest} for row in own[old]]
            elif run.digest in others:
                found[key] = others[run.digest]
        return found


def _table_of(grid: Path) -> Path:
    return grid.parent / "results" / f"{grid.stem}.csv"


def _curves_of(grid: Path) -> Path:
    return grid.parent / "results" / f"{grid.stem}_curves.csv"


def _read_rows(path: Path, columns: Sequence[str]) -> _Rows:
    found: _Rows = {}
    for row in read_table(path, ("arm", "digest", *columns)):
        found.setdefault((row["arm"], row["digest"]), []).append(row)
    return found


def _digests_of(run: GridRun, rows: _Rows) -> set[str]:
    """The digests of all rows of a run's arm and seed: more than one if its options have changed."""
    return {digest for (arm, digest), (row, *_) in rows.items() if (arm, row.get("seed")) == (run.arm, str(run.seed))}


def read_grid(path: Path) -> Grid:
    """Read a grid from a YAML file. Raises UsageError if it cannot be read, is incomplete or holds a mistake."""
    where = f"grid {path}"
    values = _read_values(path, ())
    shared = {**_read_recipe(values, where), **_read_options(values.get("options") or {}, f"{where}: options")}
    data = read_entry(values, "data", Location, where)
    test = read_value(Location | None, values.get("test"), f"{where}: test")
    runs: list[GridRun] = []
    arms: dict[str, tuple[str, dict[str, Any]]] = {}  # each arm's first group, and its own options
    for group, part in read_entry(values, "groups", dict[str, Any], where).items():
        seeds, own = _read_group(part, f"{where}: group {group!r}")
        for arm, options in own.items():
            first, others = arms.setdefault(arm, (group, options))
            if options != others:
                raise UsageError(f"{where}: two arms are called {arm!r}, in the groups {first!r} and {group!r}; rename one")
        runs += [build_run(group, arm, seed, {**shared, **own[arm]}, (data, test)) for seed in seeds for arm in own]
    if not runs:
        raise UsageError(f"{where}: groups holds no arm")
    compare = _read_pairs(values.get("compare") or [], {run.arm for run in runs}, where)
    reuse = tuple(Path(name) for name in values.get("reuse") or [])
    for other in reuse:
        _read_values(other, ())  # that it is a grid
        if other.resolve() == path.resolve():
            raise UsageError(f"{where}: reuse names the grid itself")
    grid = Grid(path, runs, compare, data, test, reuse)
    _check_runs(grid, where)
    return replace(grid, runs=_link_runs(grid, where))


def _link_runs(grid: Grid, where: str) -> list[GridRun]:
    """The runs of a grid, each with those that it begins with, and after them.

    Raises UsageError if one begins with itself, or with an arm that is not there.
    """
    linked: dict[tuple[str, int], GridRun] = {}

    def link(run: GridRun, above: tuple[str, ...]) -> GridRun:
        """`above`: the arms that need this one, from the first to the last."""
        key = run.arm, run.seed
        if run.arm in above:
            circle = " → ".join(map(repr, (*above[above.index(run.arm) :], run.arm)))
            raise UsageError(f"{where}: an arm begins with its own result: {circle}; change one of these {RUN_OF}")
        if key not in linked:
            needed = {name: grid.find(arm, run.seed) for name, arm in _find_needs(run.options).items()}
            begins = {name: link(one, (*above, run.arm)) for name, one in needed.items()}
            linked[key] = replace(run, begins=begins)
        return linked[key]

    for run in grid.runs:
        link(run, ())
    return list(linked.values())


def _read_values(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a grid, over those of the grid that it is like. `readers`: the grids that are like this one."""
    where = f"grid {path}"
    found = read_yaml(path, "grid")
    if not isinstance(found, dict):
        raise UsageError(f"{where} must hold the keys {', '.join(KEYS)}")
    _check_names(found, KEYS, f"{where}: unknown key", "keys")
    if "recipe" in found:
        found["recipe"] = str(path.parent / read_entry(found, "recipe", Location, where))
    if found.get("reuse") is not None:
        names = read_value(list[Location], found["reuse"], f"{where}: reuse")
        found["reuse"] = [str(path.parent / name) for name in names]
    like = read_value(Location | None, found.pop("like", None), f"{where}: like")
    if like is None:
        return found
    readers = (*readers, path.resolve())
    other = path.parent / like
    if other.resolve() in readers:
        raise UsageError(f"{where}: like leads back to {other}")
    base = _read_values(other, readers)
    options: dict[str, Any] = {}
    for values, name in ((base, f"grid {other}"), (found, where)):  # of options, each overrides one
        options |= read_value(dict[str, Any], values.get("options") or {}, f"{name}: options")
    return {**base, **found, "options": options}


def _read_recipe(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    recipe = read_entry(values, "recipe", Location, where)
    found: dict[str, Any] = read_value(dict[str, Any], read_yaml(recipe, f"{where}: recipe"), f"{where}: recipe {recipe}")
    _check_names(found, _known_options(), f"{where}: recipe {recipe}: unknown option", "")
    return found


def _read_options(values: Any, where: str) -> dict[str, Any]:
    """Options of `dgnet train`, and `evaluate`. Raises UsageError for one that is unknown, or that the grid itself says."""
    options: dict[str, Any] = read_value(dict[str, Any], values, where)
    _check_names(options, (*_known_options(), "evaluate"), f"{where}: unknown option", "")
    for name, instead in _SET.items():
        if name in options:
            raise UsageError(f"{where} cannot set {name}: {instead} says it")
    if "evaluate" in options:
        read_value(dict[str, Any], options["evaluate"], f"{where}: evaluate")
    return options


def _known_options() -> list[str]:
    return [f.name for f in fields(TrainConfig)]


def _check_names(values: Iterable[Any], known: Iterable[str], what: str, listed: str) -> None:
    known = list(known)
    for name in values:
        if name not in known:
            hint = did_you_mean(str(name), known)
            listing = f"{listed}: {', '.join(known)}" if listed else "options of a network are entries of model_kwargs"
            raise UsageError(f"{what} {name!r}{hint or ';'} {listing}")


def _read_group(values: Any, where: str) -> tuple[list[int], dict[str, dict[str, Any]]]:
    """The seeds of a group, and for each arm its options."""
    read_value(dict[str, Any], values, where)
    _check_names(values, _GROUP_KEYS, f"{where}: unknown key", "keys")
    seeds = read_entry(values, "seeds", list[int], where)
    if not seeds:
        raise UsageError(f"{where}: seeds lists none")
    for seed in seeds:
        if seeds.count(seed) > 1:
            raise UsageError(f"{where}: seed {seed} is given twice; remove one")
        check_range(f"{where}: a seed", seed, 0, 2**32 - 1)
    arms = {
        arm: _read_options(options, f"{where}: arm {arm!r}")
        for arm, options in read_entry(values, "arms", dict[str, Any], where).items()
    }
    return seeds, arms


def build_run(group: str, arm: str, seed: int, options: dict[str, Any], images: tuple[str | None, ...]) -> GridRun:
    """A run with `options` (the arm's and the recipe's) and the grid's `images`."""
    evaluation = options.pop("evaluate", {})
    options = {"model": TrainConfig.model, **options, "seed": seed}
    return GridRun(group, arm, seed, fill_seed(options, seed), dict(evaluation), images)


def fill_seed(value: Any, seed: int) -> Any:
    """`value` with each "$seed" replaced by the run's seed, for example to give each run its own random graph."""
    if isinstance(value, dict):
        return {name: fill_seed(item, seed) for name, item in value.items()}
    return seed if value == "$seed" else value


def _read_pairs(values: Any, arms: set[str], where: str) -> list[tuple[str, str]]:
    what = f"{where}: compare"
    if not isinstance(values, list):
        raise UsageError(f"{what} must be a list of pairs of arms, as in [[static, dynamic]]")
    pairs: list[tuple[str, str]] = []
    for number, pair in enumerate(values):
        first, second = read_value(tuple[str, str], pair, f"{what}[{number}]")
        for name in (first, second):
            if name not in arms:
                hint = did_you_mean(name, arms)
                raise UsageError(
                    f"{what} has {name!r}, which is not an arm{hint}" + ("" if hint else f"; arms: {', '.join(sorted(arms))}")
                )
        pairs.append((first, second))
    return pairs


def _check_runs(grid: Grid, where: str) -> None:
    """Raises UsageError for a run without images to evaluate on, or with two kinds, and for a run that is there twice."""
    runs: dict[tuple[str, int], str] = {}
    for run in grid.runs:
        is_held_out = bool(run.options.get("holdout"))
        if (grid.test is not None and is_held_out) or (grid.test is None and not is_held_out and is_shards(grid.data)):
            raise UsageError(
                f"{where}: arm {run.arm!r} needs either `test` in the grid or `holdout` among its options, not both"
            )
        group = runs.setdefault((run.arm, run.seed), run.group)
        if group != run.group:
            raise UsageError(f"{where}: arm {run.arm!r} with seed {run.seed} is in two groups: {group}, {run.group}")


def missing_runs(
    grid: Grid, groups: Sequence[str] = (), is_there: Callable[[GridRun], bool] = lambda run: True
) -> list[GridRun]:
    """The runs to run, in the grid's order: those of `groups` (none: all) that are not finished, and those that they need.

    `is_there`: whether the run folder of a finished run is there. Runs that begin with its result need it.
    """
    done = grid.read_finished()
    wanted = [run for run in grid.runs if (run.arm, run.digest) not in done and (not groups or run.group in groups)]
    names = {run.name for run in wanted}
    for run in wanted:  # those that are appended are visited too
        needed = [one for one in run.begins.values() if one.name not in names]
        absent = [one for one in needed if (one.arm, one.digest) not in done or not is_there(one)]
        wanted += absent
        names |= {one.name for one in absent}
    return [run for run in grid.runs if run in wanted]
