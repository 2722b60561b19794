"""What can be wrong with the runs of a grid, found before the first of them starts."""

from __future__ import annotations

from collections.abc import Sequence

from dgnet.code import CODE_OPTIONS, find_code, is_code_path
from dgnet.data import check_source
from dgnet.errors import UsageError
from dgnet.experiments._grid import Grid, GridRun
from dgnet.experiments._places import Places
from dgnet.models import check_callable
from dgnet.training import TrainConfig


def check_runs(grid: Grid, runs: Sequence[GridRun], places: Places) -> None:
    """Raises UsageError, which names the arm, for options that `dgnet train` refuses, and for code that cannot be used.

    Code of the user's own is imported, if it is trusted; see `dgnet.code`.
    """
    for run in {run.arm: run for run in reversed(runs)}.values():  # an arm's seeds have the same options
        try:
            config = TrainConfig(**places.options(grid, run))
            for name in CODE_OPTIONS:
                value = config.network_kwargs.get(name)
                if is_code_path(value):
                    check_callable(name, find_code(str(value), name))
        except UsageError as error:
            raise UsageError(f"grid {grid.path}: arm {run.arm!r}: {error}") from None


def check_images(grid: Grid, runs: Sequence[GridRun], places: Places) -> None:
    """Raises UsageError if images that the runs need are not there."""
    for run in runs[:1]:  # all have the same images
        options = places.options(grid, run)
        for source in filter(None, (options["data"], options["val_data"])):
            check_source(source)
