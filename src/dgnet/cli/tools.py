"""`dgnet models`, `cost`, `bench` and `export`."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields
from pathlib import Path

from jsonargparse import Namespace

import dgnet
from dgnet.cli.command import (
    Command,
    Parser,
    add_device,
    add_fields,
    add_json,
    find_device,
    print_json,
    warn_if_nothing_skips,
)
from dgnet.cli.weights import add_checkpoint_or_weights, open_checkpoint, remark
from dgnet.errors import UsageError, check_choice
from dgnet.paths import find_kind, is_folder
from dgnet.typed import Location


def _models_parser() -> Parser:
    parser = Parser(description="Print the names of the models, one per line.")
    parser.add_argument(
        "--pretrained", action="store_true", help="those whose weights come with dgnet, with their accuracy and multiply-adds"
    )
    add_json(parser)
    return parser


def run_models(args: Namespace) -> None:
    """`dgnet models`."""
    from dgnet.models import list_pretrained

    names = dgnet.list_models()
    found = list_pretrained() if args.pretrained else []
    if args.json:
        print_json([asdict(row) for row in found] if args.pretrained else names)
        return
    for name in names if not args.pretrained else []:
        print(name)
    if args.pretrained and not found:
        print("no weights come with this version of dgnet; timm has weights for its own networks", file=sys.stderr)
    if found:
        print(f"{'name':<36}{'top-1 %':>8}{'params M':>10}{'MAdds M':>9}{'executed M':>12}")
    for row in found:
        cells = f"{row.top1:>8.2f}{row.parameters / 1e6:>10.3f}{row.dense_multiply_adds / 1e6:>9.2f}"
        print(f"{row.name:<36}{cells}{row.executed_multiply_adds / 1e6:>12.2f}")


def _cost_parser() -> Parser:
    parser = Parser(description="Print parameters and multiply-adds, and compare them with the paper's.")
    parser.add_argument("models", type=str, nargs="*", metavar="MODEL", help="names; by default the rows of Table 1")
    parser.add_argument(
        "--table", type=str | None, default=None, metavar="N", help="print the rows of the paper's Table 1, 2, 4 or 5"
    )
    parser.add_argument(
        "--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels; by default those of the table or the model"
    )
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_json(parser)
    return parser


def run_cost(args: Namespace) -> None:
    """`dgnet cost`."""
    from dgnet._cost_tables import cost_rows, format_cost_table

    rows = cost_rows(args.models, tuple(args.image_size) if args.image_size else None, args.table)
    if args.json:
        print_json(rows)
    else:
        print(format_cost_table(rows, args.table, args.markdown))


def _bench_parser() -> Parser:
    from dgnet.bench import BenchConfig

    parser = Parser(description="Compare two networks in one run: time, throughput and memory, as ratios.")
    parser.add_argument("model", type=str, metavar="MODEL", help="name of the network")
    add_fields(parser, BenchConfig)
    add_device(parser)
    add_json(parser)
    return parser


def run_bench(args: Namespace) -> None:
    """`dgnet bench`."""
    from dgnet.bench import BenchConfig, bench, format_bench

    values = {f.name: args[f.name] for f in fields(BenchConfig) if f.name in args}
    result = bench(BenchConfig(**{**values, "device": find_device(args.device)}))
    if args.json:
        print_json(asdict(result))
    else:
        print(format_bench(result))


def _export_parser() -> Parser:
    parser = Parser(description="Export a checkpoint's network for other runtimes, and compare the file with the checkpoint.")
    add_checkpoint_or_weights(parser)
    parser.add_argument("--format", type=str, default="onnx", help="onnx, or torch (torch.export, .pt2)")
    parser.add_argument(
        "--mode",
        type=str,
        default="dense",
        help="dense (all blocks run, closed edges masked), or sparse: a block runs only on the images for which it is alive",
    )
    parser.add_argument(
        "--output", type=Location | None, default=None, help="file to write; by default MODEL-MODE.onnx or .pt2"
    )
    add_json(parser)
    return parser


def run_export(args: Namespace) -> None:
    """`dgnet export`."""
    from dgnet.checkpoint import describe_network
    from dgnet.inference import FORMATS, MODES, check_export, export_network, require_packages, save_export

    require_packages(args.format)
    check_choice("--mode", args.mode, MODES)
    checkpoint, remarks = open_checkpoint(args)
    network = checkpoint.build_network()
    size = checkpoint.preprocessing.image_size
    path = Path(args.output or f"{checkpoint.model}-{args.mode}{FORMATS[args.format]}")
    if path.suffix != FORMATS[args.format]:
        raise UsageError(f"--output {path} must end in {FORMATS[args.format]} for --format {args.format}")
    if find_kind(path) not in (None, "file"):
        raise UsageError(f"--output {path} is no file; name another")
    if not is_folder(path.parent):
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist; create it first")
    remark(remarks)
    print(f"exporting {checkpoint.model}, {args.mode} form, {size[0]}×{size[1]} pixels: about half a minute", file=sys.stderr)
    program = export_network(network, size, args.mode)
    if args.mode == "sparse":
        warn_if_nothing_skips(network, checkpoint.path)
    # Leave out the run's configuration: it names folders of the machine that trained the network.
    carried = describe_network(
        checkpoint.model, checkpoint.model_kwargs, checkpoint.class_names, checkpoint.preprocessing, config={}
    )
    save_export(program, path, args.format, carried)
    difference = check_export(path, args.format, network, size)
    megabytes = path.stat().st_size / 2**20
    if args.json:
        found = {"file": str(path), "format": args.format, "mode": args.mode, "megabytes": megabytes}
        print_json(found | {"difference": difference})
        return
    print(f"{path}: {megabytes:.1f} MiB; differs from the checkpoint by {difference:.1e} of the largest logit")


MODELS = Command(_models_parser, run_models)
COST = Command(_cost_parser, run_cost)
BENCH = Command(_bench_parser, run_bench, sets_memory=True)
EXPORT = Command(_export_parser, run_export)
