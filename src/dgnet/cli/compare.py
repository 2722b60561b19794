"""`dgnet compare`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from jsonargparse import Namespace

from dgnet.cli.command import Command, Parser, add_device, add_json, add_trust, find_device, print_json, write_then_print
from dgnet.files import make_writable
from dgnet.typed import Location


def _compare_parser() -> Parser:
    parser = Parser(
        description="Compare classifiers or detectors as deployed: accuracy, executed multiply-adds, latency and images/s."
    )
    parser.add_argument(
        "runs",
        type=str,
        nargs="+",
        metavar="RUN",
        help="run folders, checkpoints, or published networks (local-dir:FOLDER, hf-hub:USER/NAME, a name that dgnet models"
        " --pretrained lists), each also as LABEL=RUN; speeds are ratios to the first",
    )
    parser.add_argument(
        "--data",
        type=Location | None,
        default=None,
        help="images, or annotations for detectors; by default those that the first run was evaluated on",
    )
    parser.add_argument(
        "--images", type=Location | None, default=None, help="for detectors: folder of the images; by default that of each run"
    )
    parser.add_argument(
        "--data-root", type=Location | None, default=None, help="folder that holds the torch/… and hfds/… data sets"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64], help="batch sizes to time")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds")
    parser.add_argument(
        "--compile",
        type=bool,
        default=True,
        help="compile the networks (needs a C++ compiler; takes up to a minute for each network and batch size); false: do not",
    )
    parser.add_argument("--allow-mixed-sizes", action="store_true", help="compare networks that take images of different sizes")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--output", type=Location, default="comparison", help="folder for tables, picture and page")
    add_trust(parser)
    add_device(parser)
    add_json(parser)
    return parser


def run_compare(args: Namespace) -> int:
    """`dgnet compare`; returns 1 if a run could not be loaded, else 0."""
    from dgnet.comparison import compare, format_comparison, save_comparison

    folder = Path(args.output)
    make_writable(folder)
    found = compare(
        args.runs,
        args.data,
        args.batch_sizes,
        args.rounds,
        find_device(args.device),
        args.compile,
        args.allow_mixed_sizes,
        args.data_root,
        args.images,
        workers=args.workers,
    )

    def show() -> None:
        if args.json:
            print_json(asdict(found))
        else:
            print(format_comparison(found))
            print(f"written to {folder}: compare.json, compare.csv, compare.png, compare.svg, compare.html")

    write_then_print(lambda: save_comparison(found, folder), show)
    return int(bool(found.failed))


COMPARE = Command(_compare_parser, run_compare)
