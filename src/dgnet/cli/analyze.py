"""`dgnet analyze`: statistics and figures of connectivity, and the explorer page."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dgnet.cli.command import (
    Command,
    Parser,
    add_json,
    add_loader_options,
    apply_max_pixels,
    describe_wirings,
    find_device,
    print_json,
    write_then_print,
)
from dgnet.cli.weights import add_checkpoint_or_weights, find_results_folder, open_checkpoint, remark
from dgnet.errors import UsageError, check_range
from dgnet.options import flag
from dgnet.paths import find_kind
from dgnet.typed import Location


def _parser() -> Parser:
    parser = Parser(description="Analyse a checkpoint's connectivity: statistics, the paper's figures, an interactive page.")
    add_checkpoint_or_weights(parser, nargs="?")
    parser.add_argument(
        "others",
        type=Location,
        nargs="*",
        metavar="RUN",
        help="runs of the same network with other seeds: means over these runs and the first; needs --output",
    )
    parser.add_argument("--data", type=Location | None, default=None, help="images; by default those the run was evaluated on")
    parser.add_argument(
        "--data-root", type=Location | None, default=None, help="folder that holds the torch/… and hfds/… data sets"
    )
    parser.add_argument(
        "--output",
        type=Location | None,
        default=None,
        help="folder to write to; by default `analysis` in the run folder, beside the checkpoint file, or for a published"
        " network in the current folder",
    )
    parser.add_argument(
        "--images",
        type=Location,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="images whose graphs are drawn: indices or file names",
    )
    parser.add_argument(
        "--extremes",
        type=int | None,
        default=None,
        help="number of easiest and of hardest images whose graphs are drawn, by loss and by executed multiply-adds;"
        " by default 3, or 0 with --images",
    )
    parser.add_argument(
        "--curves", type=Location, nargs="+", default=[], metavar="RUN", help="run folders whose training curves are drawn"
    )
    parser.add_argument(
        "--explorer",
        type=int,
        default=1000,
        help="number of images in explorer.html, a page to select and compare images; 0 writes no page",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for drawing the images of the embedding")
    add_loader_options(parser)
    add_json(parser)
    return parser


def run_analyze(args: Namespace) -> None:
    """`dgnet analyze`."""
    from dgnet.analysis import read_curves, save_curves, save_document

    if args.checkpoint is None and not args.curves:
        raise UsageError("name a checkpoint, or runs with --curves; see: dgnet analyze --help")
    folder = _find_folder(args)
    if find_kind(folder) not in (None, "folder"):
        raise UsageError(f"--output {folder} cannot be written: it is a file; name another with --output")
    curves = read_curves(args.curves)  # first: report a mistake before minutes of work
    document: dict[str, Any] = {}
    lines: list[str] = []
    files: list[Path] = []
    writers: list[Callable[[], list[Path]]] = []
    if args.others:
        document, lines, writers = _analyze_seeds(args, folder)
    elif args.checkpoint is not None:
        document, lines, writers = _analyze(args, folder)
    if curves:
        writers.append(lambda: save_curves(curves, folder))

    def write() -> None:
        try:
            for writer in writers:
                files.extend(writer())
        finally:
            document["files"] = [path.name for path in files]
        if args.checkpoint is not None:  # with --curves alone, keep an existing analysis.json
            files.append(save_document(document, folder))

    def show() -> None:
        if args.json:
            print_json(document)
            return
        for line in lines:
            print(line)
        if files:
            print(f"written to {folder}: {', '.join(path.name for path in files)}")

    write_then_print(write, show)


def _find_folder(args: Namespace) -> Path:
    if args.output:
        return Path(args.output)
    if args.others:
        raise UsageError("several runs need --output, a folder to write their means to")
    if args.checkpoint is None:
        raise UsageError("--curves without a checkpoint needs --output, a folder to write to")
    return find_results_folder(args.checkpoint) / "analysis"


def _analyze(args: Namespace, folder: Path) -> tuple[dict[str, Any], list[str], list[Callable[[], list[Path]]]]:
    """Analyse the checkpoint; returns the JSON document, the lines to print, and functions that write files."""
    from dgnet.analysis import find_analysis, save_analysis, write_explorer
    from dgnet.evaluation import announce, describe_source, open_evaluation_data
    from dgnet.inference import can_skip

    apply_max_pixels(args)
    checkpoint, remarks = open_checkpoint(args)
    network = checkpoint.build_dynamic()
    dataset = open_evaluation_data(checkpoint, args.data, args.data_root, needs_labels=False)
    extremes = (0 if args.images else 3) if args.extremes is None else args.extremes
    check_range("--explorer", args.explorer, 0)
    check_range("--seed", args.seed, 0)
    loading: dict[str, Any] = {"batch_size": args.batch_size, "workers": args.workers, "device": find_device(args.device)}
    source = describe_source(checkpoint, args.data)
    remark(remarks)
    announce(dataset)
    found = find_analysis(network, dataset, folder, args.images, extremes, seed=args.seed, **loading)

    def write() -> list[Path]:
        save_analysis(found, folder)
        return found.files

    def write_page() -> list[Path]:
        page = write_explorer(
            network,
            dataset,
            folder / "explorer.html",
            images=args.explorer,
            class_names=checkpoint.class_names,
            model=checkpoint.model,
            source=source,
            **loading,
        )
        return [page]

    writers = [write]
    if args.explorer and can_skip(network):
        writers.append(write_page)
    elif args.explorer:
        print(
            "explorer.html is not written: no edge or block can close, so every offset gives the same result", file=sys.stderr
        )
    document = {"checkpoint": str(checkpoint.path), "model": checkpoint.model, "data": source, **found.document()}
    lines = [f"{checkpoint.path}: {checkpoint.model} on {source}, {document['images']:,} images"]
    if document["labelled"]:
        lines.append(f"top-1 {document['top1']:.2f} %, loss {document['loss']:.4f}, {document['labelled']:,} images labelled")
    else:
        lines.append("no image has a label: no accuracy, loss or classes")
    if not found.follows_image:
        lines.append("no weight depends on the image: no spread, open shares or wirings to compare")
    at_least = "" if document["all_wirings_counted"] else "at least "
    lines += [
        describe_wirings(document, at_least),
        f"executed multiply-adds {document['executed_multiply_adds'] / 1e6:.2f} M"
        f" of {document['dense_multiply_adds'] / 1e6:.2f} M, standard deviation {document['executed_std'] / 1e6:.2f} M,"
        f" {document['executed_least'] / 1e6:.2f} to {document['executed_most'] / 1e6:.2f} M",
        "observations of the paper's §6.5:",
        *map(str, found.observations),
    ]
    return document, lines, writers


def _analyze_seeds(args: Namespace, folder: Path) -> tuple[dict[str, Any], list[str], list[Callable[[], list[Path]]]]:
    """Analyse runs of one network with different seeds; returns what `_analyze` does."""
    from dgnet.analysis import SeedMeans, check_seeds, find_analysis
    from dgnet.checkpoint import load_checkpoint
    from dgnet.evaluation import announce, describe_source, open_evaluation_data

    for name in ("images", "extremes", "model"):
        if args[name] not in (None, []):
            raise UsageError(f"{flag(name)} is for one checkpoint, and {1 + len(args.others)} are named; leave it out")
    apply_max_pixels(args)
    checkpoints = [load_checkpoint(run) for run in (args.checkpoint, *args.others)]
    first = checkpoints[0]
    for checkpoint in checkpoints:
        if (checkpoint.model, checkpoint.class_names) != (first.model, first.class_names):
            raise UsageError(
                f"{checkpoint.path} is of {checkpoint.model} with {len(checkpoint.class_names):,} classes, and {first.path} of"
                f" {first.model} with {len(first.class_names):,}; means are over runs of one network"
            )
    networks = [checkpoint.build_dynamic() for checkpoint in checkpoints]
    names = [str(checkpoint.path) for checkpoint in checkpoints]
    check_seeds(networks, names)
    dataset = open_evaluation_data(first, args.data, args.data_root, needs_labels=False)
    announce(dataset)
    loading: dict[str, Any] = {"batch_size": args.batch_size, "workers": args.workers, "device": find_device(args.device)}
    found = [find_analysis(network, dataset, folder, extremes=0, **loading) for network in networks]
    means = SeedMeans(found)
    source = describe_source(first, args.data)
    document = {"checkpoints": names, "model": first.model, "data": source, **means.document()}
    figures = document["figures"]
    lines = [f"{len(found)} runs of {first.model} on {source}, mean ± standard deviation over runs"]
    for name in ("top1", "closed_edges", "weight_std", "executed_multiply_adds"):
        if name in figures:
            lines.append(f"{name} {figures[name]['mean']:,.4f} ± {figures[name]['std']:,.4f}")
    return document, lines, [lambda: means.save(folder)]


ANALYZE = Command(_parser, run_analyze)
