"""Grids of training runs: arms, several seeds for each, and comparisons; what is missing is run, what is there is reported."""

from typing import TYPE_CHECKING

from dgnet._lazy import lazy_names

if TYPE_CHECKING:
    from dgnet.experiments._check import check_runs as check_runs
    from dgnet.experiments._figures import save_figures as save_figures
    from dgnet.experiments._grid import Grid as Grid
    from dgnet.experiments._grid import GridRun as GridRun
    from dgnet.experiments._grid import missing_runs as missing_runs
    from dgnet.experiments._grid import read_grid as read_grid
    from dgnet.experiments._places import Places as Places
    from dgnet.experiments._report import Arms as Arms
    from dgnet.experiments._report import collect as collect
    from dgnet.experiments._report import column as column
    from dgnet.experiments._report import difference as difference
    from dgnet.experiments._report import format_mean as format_mean
    from dgnet.experiments._report import format_report as format_report
    from dgnet.experiments._report import format_table as format_table
    from dgnet.experiments._runner import run_grid as run_grid
    from dgnet.experiments._similarity import compare_with_start as compare_with_start
    from dgnet.experiments._similarity import format_comparisons as format_comparisons
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__)
