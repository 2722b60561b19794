"""`dgnet experiment run`, `report` and `similarity`: grids of training runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from dgnet._guard import report_end
from dgnet.cli.classify import EVALUATE
from dgnet.cli.command import Command, Group, Parser, add_trust
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.options import as_word, flag
from dgnet.paths import is_folder
from dgnet.typed import Location

if TYPE_CHECKING:
    from dgnet.experiments import Grid, GridRun


def _run_parser() -> Parser:
    parser = Parser(description="Run what a grid lacks: train and evaluate each of its arms with each of its seeds.")
    parser.add_argument("grid", type=Location, metavar="GRID", help="YAML file with arms, seeds and comparisons")
    parser.add_argument(
        "--data", type=Location | None, default=None, help="folder that holds the grid's data, if these are relative paths"
    )
    parser.add_argument(
        "--weights", type=Location | None, default=None, help="folder that holds the grid's weights; by default that of --data"
    )
    parser.add_argument("--output", type=Location, default="runs", help="folder for run folders and logs")
    parser.add_argument("--groups", type=str, nargs="+", default=[], metavar="GROUP", help="run only these groups")
    parser.add_argument(
        "--jobs", type=int | None, default=None, help="runs at the same time; by default one per core, or four per GPU"
    )
    parser.add_argument("--minutes", type=float | None, default=None, help="start no new run after this many minutes")
    parser.add_argument(
        "--import",
        dest="imports",
        type=str | None,
        default=None,
        metavar="PACKAGES",
        help="packages of your own, separated by commas, whose classes the grid names: as for dgnet train",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the missing runs, and run nothing")
    parser.recipe["imports"] = str | None  # what is typed for it is trusted
    parser.bounds |= {"jobs": (1,), "minutes": (0,)}
    return parser


def run_experiment(args: Namespace) -> int:
    """`dgnet experiment run`; returns 1 if a run failed, else 0."""
    from dgnet.experiments import Places, check_runs, missing_runs, read_grid, run_grid

    grid = read_grid(Path(args.grid))
    for group in args.groups:
        if group not in grid.groups:
            raise UsageError(f"unknown group {group!r}; groups of {args.grid}: {', '.join(grid.groups)}")
    data, weights = (None if folder is None else Path(folder) for folder in (args.data, args.weights))
    places = Places(Path(args.output), data, weights)
    missing = missing_runs(grid, args.groups, lambda run: is_folder(places.folder(run)))
    _check_evaluations(grid, missing)
    if args.dry_run:
        check_runs(grid, missing, replace(places, data=data or Path()))  # nothing is read: any folder does
        for run in missing:
            print(f"{run.group}: {run.arm}, seed {run.seed}")
        return 0
    minutes = math.inf if args.minutes is None else args.minutes
    try:
        failed = run_grid(grid, missing, places, jobs=args.jobs, minutes=minutes, imports=args.imports)
    except KeyboardInterrupt:
        report_end("dgnet: interrupted; type the same command again to continue")
        raise
    if failed:
        print(f"dgnet: {failed} of {len(missing)} runs failed; type the same command again to repeat them", file=sys.stderr)
    return int(failed > 0)


def _check_evaluations(grid: Grid, runs: Sequence[GridRun]) -> None:
    """Raises UsageError for an arm with options that `dgnet evaluate` refuses."""
    parser = EVALUATE.build()
    for run in {run.arm: run for run in runs if run.evaluation}.values():
        where = f"grid {grid.path}: arm {run.arm!r}: evaluate"
        for name in run.evaluation:
            if flag(name) not in parser.hints:
                raise UsageError(f"{where}: unknown option {name!r}{parser.hint(name, parser.hints)}")
        try:
            parser.parse(["RUN", *(f"{flag(name)}={as_word(value)}" for name, value in run.evaluation.items())])
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None


def _report_parser() -> Parser:
    parser = Parser(description="Print tables of a grid's finished runs, and draw their accuracy and training loss.")
    parser.add_argument("grid", type=Location, metavar="GRID", help="YAML file of the grid")
    parser.add_argument(
        "--formats", type=str, nargs="+", default=["png", "svg"], metavar="FORMAT", help="of the figures: png, svg, pdf"
    )
    return parser


def run_report(args: Namespace) -> None:
    """`dgnet experiment report`."""
    from dgnet.analysis import FORMATS
    from dgnet.experiments import collect, format_report, read_grid, save_figures

    for name in args.formats:
        check_choice("--formats", name, FORMATS)
    grid = read_grid(Path(args.grid))
    arms = collect(grid)
    print(format_report(grid, arms))
    for path in save_figures(grid, arms, list(dict.fromkeys(args.formats))):
        print(path, file=sys.stderr)


def _similarity_parser() -> Parser:
    parser = Parser(
        description="Print how similar the inputs of a stage's nodes are, which edges are open, what their weights depend"
        " on, and how clear the gradients are, at the start and after training."
    )
    parser.add_argument(
        "runs", type=Location, nargs="+", metavar="RUN", help="run folders or checkpoints of networks with dynamic stages"
    )
    parser.add_argument("--data", type=Location | None, default=None, help="images; by default those the run was evaluated on")
    parser.add_argument(
        "--images", type=int, default=64, help="number of images, the first ones of the data; with more, figures are more exact"
    )
    add_trust(parser)
    return parser


def run_similarity(args: Namespace) -> None:
    """`dgnet experiment similarity`."""
    from dgnet.experiments import compare_with_start, format_comparisons

    check_range("--images", args.images, 2)
    print(format_comparisons([compare_with_start(Path(run), args.data, args.images) for run in args.runs]))


EXPERIMENT = Group(
    "Comparisons with several seeds: grids of training runs.",
    {
        "run": Command(_run_parser, run_experiment, sets_memory=True),
        "report": Command(_report_parser, run_report),
        "similarity": Command(_similarity_parser, run_similarity),
    },
)
