"""The `dgnet` command: parses, calls, prints.

Exit status: 0 done; 2 a mistake in what was asked for, in one line on stderr; 130 interrupted, 143 terminated; 1 anything else.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

import dgnet
from dgnet.errors import UsageError, check_choice, check_range, did_you_mean, reason
from dgnet.memory import keep_freed_memory
from dgnet.options import flag


class Parser(ArgumentParser):
    """jsonargparse's parser whose errors are one line with a hint."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UsageError in place of printing the usage and leaving."""
        line = " ".join(str(message).split())
        line = re.sub(r'^Parser key "([\w.]+)":', lambda match: f"--{match[1].replace('_', '-')}:", line)
        raise UsageError(line.replace("<class ", "").replace("'>.", "'."))


def build_parser(command: str | None = None) -> tuple[Parser, dict[str, Parser]]:
    """The parser of `dgnet`, and by name that of one command or of all: building one imports what it needs."""
    parser = Parser(prog="dgnet", description="Dynamic Graph Networks for vision.", exit_on_error=False)
    parser.add_argument("--version", action="version", version=f"dgnet {dgnet.__version__}")
    subcommands = parser.add_subcommands(dest="command", required=False, metavar="COMMAND")
    subparsers = {name: build() for name, (build, _) in _COMMANDS.items() if command in (None, name)}
    for name, subparser in subparsers.items():
        subcommands.add_subcommand(name, subparser, help=subparser.description)
    return parser, subparsers


def _models_parser() -> Parser:
    return Parser(description="Print the names of the models, one a line.")


def _train_parser() -> Parser:
    from dgnet.training.config import TrainConfig

    parser = Parser(description="Train a network; without arguments, a small DG-Net on handwritten digits.")
    parser.add_argument("--config", action=ActionConfigFile, help="recipe: a YAML file of these options")
    parser.add_argument("--resume", type=str | None, default=None, metavar="RUN", help="go on with the run in this folder")
    _add_fields(parser, TrainConfig)
    return parser


def _add_fields(parser: Parser, config: type[Any]) -> None:
    """An option for each field of the dataclass `config` that was made with `dgnet.options.option`."""
    hints = get_type_hints(config)
    for f in fields(config):
        if "help" in f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            parser.add_argument(flag(f.name), type=hints[f.name], default=default, help=f.metadata["help"])


def _add_device(parser: Parser) -> None:
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")


def _evaluate_parser() -> Parser:
    parser = Parser(description="Evaluate a checkpoint: accuracy, and how its connectivity behaved.")
    parser.add_argument("checkpoint", type=str, help="run folder, .ckpt file or model.safetensors")
    parser.add_argument("--data", type=str | None, default=None, help="images; by default what the run was evaluated on")
    parser.add_argument("--data-root", type=str | None, default=None, help="folder in which torch/… and hfds/… data sets lie")
    _add_loader_options(parser)
    parser.add_argument(
        "--adjacency-controls", action="store_true", help="also give every image the mean of all weights, and another image's"
    )
    parser.add_argument(
        "--mode", type=str, default="dense", help="dense, or sparse: a block runs on the images for which it is alive"
    )
    parser.add_argument(
        "--threshold-offset", type=float | None, default=None, help="edges close under τ + this, gates under ½ + this"
    )
    parser.add_argument(
        "--write", type=str | None, default=None, help="write a checkpoint with --threshold-offset: FILE.safetensors"
    )
    parser.add_argument(
        "--sweep-threshold", action="store_true", help="accuracy, cost and time over threshold offsets, as a table and a plot"
    )
    parser.add_argument(
        "--offsets", type=list[float] | None, default=None, help="those of the sweep, as [-0.1, 0, 0.1]; by default 11"
    )
    parser.add_argument(
        "--output", type=str | None, default=None, help="folder for the sweep's table and plot; by default the run folder"
    )
    parser.add_argument(
        "--speed", action="store_true", help="also images/s of the static baseline and of both modes, in one run"
    )
    parser.add_argument("--compile", action="store_true", help="with --speed: compile; the sparse mode at --batch-size 1 only")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def _export_parser() -> Parser:
    parser = Parser(description="Write a checkpoint's network for other runtimes, and check it against the checkpoint.")
    parser.add_argument("checkpoint", type=str, help="run folder, .ckpt file or model.safetensors")
    parser.add_argument("--format", type=str, default="onnx", help="onnx, or torch (torch.export, .pt2)")
    parser.add_argument(
        "--mode",
        type=str,
        default="dense",
        help="dense: masked; sparse: a block runs on the gathered images for which it is alive",
    )
    parser.add_argument("--output", type=str | None, default=None, help="file to write; by default MODEL-MODE.onnx or .pt2")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def _add_loader_options(parser: Parser) -> None:
    parser.add_argument("--batch-size", type=int, default=128, help="images a forward pass")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images; 0 loads in the main process")
    _add_device(parser)


def _predict_parser() -> Parser:
    parser = Parser(description="Print the most probable classes of images.")
    parser.add_argument("checkpoint", type=str, help="run folder, .ckpt file or model.safetensors")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--top-k", type=int, default=5, help="classes to print for an image")
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def _cost_parser() -> Parser:
    parser = Parser(description="Print parameters and multiply-adds beside the paper's.")
    parser.add_argument("models", type=str, nargs="*", metavar="MODEL", help="names; by default the rows of Table 1")
    parser.add_argument(
        "--table", type=str | None, default=None, metavar="N", help="the rows of the paper's Table 1, 2, 4 or 5"
    )
    parser.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels; by default the table's or model's")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table")
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def _bench_parser() -> Parser:
    from dgnet.bench import BenchConfig

    parser = Parser(description="Measure two networks against each other: time, throughput and memory, as ratios of one run.")
    parser.add_argument("model", type=str, metavar="MODEL", help="name of the network")
    _add_fields(parser, BenchConfig)
    _add_device(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dgnet`; returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = next((word for word in arguments if not word.startswith("-")), None)
    try:
        if command is not None and command not in _COMMANDS:
            hint = did_you_mean(command, _COMMANDS) or ";"
            raise UsageError(f"unknown command {command!r}{hint} commands: {', '.join(_COMMANDS)}")
        parser, subparsers = build_parser(command)
        if command is None:
            parser.parse_args(arguments)  # --help and --version leave here
            parser.print_help(sys.stderr)
            return 2
        _check_options(command, arguments[arguments.index(command) + 1 :], subparsers[command])
        _, run = _COMMANDS[command]
        if command != "bench":  # there it is an option
            keep_freed_memory()
        if command == "train" and {"--resume", "--config"} <= {word.partition("=")[0] for word in arguments}:
            raise UsageError("--resume goes on as config.yaml of the run says: leave out --config")
        args = parser.parse_args(arguments)[command]
        if command == "train" and args.resume is not None:
            args = parser.parse_args(arguments, defaults=False)[command]  # what was given, no more
        run(args)
    except UsageError as error:
        print(f"dgnet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dgnet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe had enough
        return 0
    return 0


def _check_options(command: str, words: Sequence[str], parser: Parser) -> None:
    """Raises UsageError, with the nearest name, for an unknown option, and with its name for a recipe that is no YAML."""
    options = [option for action in parser._actions for option in action.option_strings]
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, _, value = word.partition("=")
        if name == "--config" and os.path.isfile(path := value or following):
            _check_yaml(path)
        name = name.partition(".")[0]
        if name.startswith("--") and name != "--" and name not in options:
            raise UsageError(f"unknown option {name}{did_you_mean(name, options)}; options: dgnet {command} --help")


def _check_yaml(path: str) -> None:
    import yaml

    try:
        yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} is no valid YAML: {reason(error)}") from None


def run_models(args: Namespace) -> None:
    """`dgnet models`."""
    for name in dgnet.list_models():
        print(name)


def run_train(args: Namespace) -> None:
    """`dgnet train`. Leaves with 128 and the signal's number where one ended the run."""
    from dgnet.training import Interrupted, TrainConfig, is_main_process, read_run, train

    resume = Path(args.resume) if args.get("resume") is not None else None
    values = {f.name: args[f.name] for f in fields(TrainConfig) if f.name in args}
    result = None
    if resume is not None:
        config, result = read_run(resume, values)
    else:
        config = TrainConfig(**values)
    try:
        if result is None:
            result = train(config, resume)
        else:
            print(f"{resume} is finished, there is nothing to go on with", file=sys.stderr)
    except Interrupted as error:
        if is_main_process():
            print(f"dgnet: {error}; go on with: dgnet train --resume {error.folder}", file=sys.stderr)
        raise SystemExit(128 + error.signum) from None
    if not is_main_process():
        return
    print(f"top-1 {result.metrics['val_top1']:.2f} % after {config.epochs} epochs; run folder: {result.folder}")
    print(f"evaluate it: dgnet evaluate {result.folder}")


def run_evaluate(args: Namespace) -> None:
    """`dgnet evaluate`."""
    from dgnet.checkpoint import load_checkpoint
    from dgnet.training import describe_source, evaluate, open_evaluation_data

    _check_evaluate(args)
    checkpoint = load_checkpoint(args.checkpoint)
    if args.threshold_offset is not None:
        options = {**checkpoint.model_kwargs, "threshold_offset": args.threshold_offset}
        checkpoint = replace(checkpoint, model_kwargs=options)
    network = checkpoint.build_network()
    dataset = open_evaluation_data(checkpoint, args.data, args.data_root)
    loading = {"batch_size": args.batch_size, "workers": args.workers, "device": _device(args.device)}
    if args.sweep_threshold:
        _sweep(args, checkpoint.path, network, dataset, loading)
        return
    if args.write:  # before minutes of evaluation: a file that cannot be written loses nothing
        checkpoint.save(Path(args.write))
        print(f"{args.write}: {checkpoint.model} with threshold_offset {args.threshold_offset}", file=sys.stderr)
    if args.mode == "sparse":
        _say_if_idle(network, checkpoint.path)
    static = checkpoint.build_static() if args.speed else None
    result = evaluate(
        network,
        dataset,
        adjacency_controls=args.adjacency_controls,
        mode=args.mode,
        static=static,
        speed=args.speed,
        compile=args.compile,
        **loading,
    )
    if args.json:
        _print_json(asdict(result))
        return
    print(f"{checkpoint.path}: {checkpoint.model} on {describe_source(checkpoint, args.data)}, {result.images:,} images")
    print(f"top-1 {result.top1:.2f} %, top-5 {result.top5:.2f} %, loss {result.loss:.4f}")
    print(
        f"closed edges {100 * result.closed_edges:.2f} %, skippable nodes {100 * result.skippable_nodes:.2f} %,"
        f" distinct wirings {result.distinct_wirings}, outputs without an open in-edge {result.empty_outputs},"
        f" spread of an edge's weight {result.weight_std:.4f}"
    )
    share = result.executed_multiply_adds / result.dense_multiply_adds
    low, middle, high = (result.executed_percentiles[name] / 1e6 for name in ("5", "50", "95"))
    print(
        f"executed multiply-adds {result.executed_multiply_adds / 1e6:.2f} M of {result.dense_multiply_adds / 1e6:.2f} M"
        f" ({100 * share:.1f} %), standard deviation {result.executed_std / 1e6:.2f} M,"
        f" 5th, 50th, 95th percentile {low:.2f}, {middle:.2f}, {high:.2f} M"
    )
    by_class = sorted(result.executed_by_class.items(), key=lambda item: item[1])
    if result.executed_std and len(by_class) > 1:
        (cheapest, least), (dearest, most) = by_class[0], by_class[-1]
        print(f"cheapest class {cheapest} {least / 1e6:.2f} M, dearest {dearest} {most / 1e6:.2f} M")
    if result.images_per_second:
        speeds = ", ".join(f"{name} {value:,.1f}" for name, value in result.images_per_second.items())
        print(f"images/s at batch {min(args.batch_size, result.images)}: {speeds}")
    if args.adjacency_controls:
        print(
            f"top-1 with the mean adjacency {result.top1_mean_adjacency:.2f} %,"
            f" with another image's {result.top1_other_adjacency:.2f} %"
        )


def _check_evaluate(args: Namespace) -> None:
    """Raises UsageError for options that do not go together."""
    has_offset = args.threshold_offset is not None
    needs = (
        ("--write", args.write, "--threshold-offset", has_offset),
        ("--offsets", args.offsets is not None, "--sweep-threshold", args.sweep_threshold),
        ("--output", args.output, "--sweep-threshold", args.sweep_threshold),
        ("--compile", args.compile, "--speed", args.speed),
    )
    for option, is_given, needed, is_there in needs:
        if is_given and not is_there:
            raise UsageError(f"{option} needs {needed}; add it, or leave {option} out")
    for option, is_given in (
        ("--threshold-offset", has_offset),
        ("--speed", args.speed),
        ("--adjacency-controls", args.adjacency_controls),
    ):
        if args.sweep_threshold and is_given:
            raise UsageError(f"--sweep-threshold does not go with {option}; leave one out")
    if args.write and not args.write.endswith(".safetensors"):
        raise UsageError(f"--write {args.write} must end in .safetensors")


def _sweep(args: Namespace, path: Path, network: Any, dataset: Any, loading: dict[str, Any]) -> None:
    """`dgnet evaluate --sweep-threshold`."""
    from dgnet.training.sweep import OFFSETS, format_sweep, save_sweep, sweep_thresholds

    points = sweep_thresholds(network, dataset, OFFSETS if args.offsets is None else args.offsets, **loading)
    folder = Path(args.output or (args.checkpoint if os.path.isdir(args.checkpoint) else path.parent))
    paths = save_sweep(points, folder)
    if args.json:
        _print_json([asdict(point) for point in points])
        return
    print(format_sweep(points))
    print(f"times: sparse mode, batch {min(args.batch_size, len(dataset))}, on {loading['device']}")
    print(f"written: {', '.join(map(str, paths))}")
    print(f"choose one: dgnet evaluate {args.checkpoint} --threshold-offset X --write FILE.safetensors")


def _say_if_idle(network: Any, path: Path) -> None:
    """One line on stderr where the sparse mode has nothing to leave out."""
    from dgnet.inference import can_skip

    if not can_skip(network):
        print(f"{path}: no edge or block can close, nothing will be skipped", file=sys.stderr)


def run_export(args: Namespace) -> None:
    """`dgnet export`."""
    from dgnet.checkpoint import describe_network, load_checkpoint
    from dgnet.inference.export import FORMATS, check_export, export_network, save_export

    check_choice("--format", args.format, FORMATS)
    checkpoint = load_checkpoint(args.checkpoint)
    network = checkpoint.build_network()
    size = checkpoint.preprocessing.image_size
    path = Path(args.output or f"{checkpoint.model}-{args.mode}{FORMATS[args.format]}")
    if path.suffix != FORMATS[args.format]:
        raise UsageError(f"--output {path} must end in {FORMATS[args.format]} for --format {args.format}")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: the folder {path.parent} does not exist; make it first")
    print(f"exporting {checkpoint.model}, {args.mode} form, {size[0]}×{size[1]} pixels: about half a minute", file=sys.stderr)
    program = export_network(network, size, args.mode)
    if args.mode == "sparse":
        _say_if_idle(network, checkpoint.path)
    # The run's configuration names folders of the machine that trained it: it stays behind.
    carried = describe_network(
        checkpoint.model, checkpoint.model_kwargs, checkpoint.class_names, checkpoint.preprocessing, config={}
    )
    save_export(program, path, args.format, carried)
    difference = check_export(path, args.format, network, size)
    megabytes = path.stat().st_size / 2**20
    if args.json:
        found = {"file": str(path), "format": args.format, "mode": args.mode, "megabytes": megabytes}
        _print_json(found | {"difference": difference})
        return
    print(f"{path}: {megabytes:.1f} MiB; differs from the checkpoint by {difference:.1e} of the largest logit")


def run_predict(args: Namespace) -> None:
    """`dgnet predict`."""
    from dgnet.checkpoint import load_checkpoint
    from dgnet.training.predict import predict

    check_range("--top-k", args.top_k, 1)
    checkpoint = load_checkpoint(args.checkpoint)
    predictions = predict(checkpoint, args.images, args.top_k, _device(args.device))
    if args.json:
        _print_json([asdict(prediction) for prediction in predictions])
        return
    for prediction in predictions:
        classes = ", ".join(
            f"{name} {100 * p:.1f} %" for name, p in zip(prediction.classes, prediction.probabilities, strict=True)
        )
        print(f"{prediction.image}: {classes}")


def run_cost(args: Namespace) -> None:
    """`dgnet cost`."""
    from dgnet.tables import cost_rows, format_cost_table

    rows = cost_rows(args.models, tuple(args.image_size) if args.image_size else None, args.table)
    if args.json:
        _print_json(rows)
    else:
        print(format_cost_table(rows, args.table, args.markdown))


def run_bench(args: Namespace) -> None:
    """`dgnet bench`."""
    from dgnet.bench import BenchConfig, bench, format_bench

    values = {f.name: args[f.name] for f in fields(BenchConfig) if f.name in args}
    result = bench(BenchConfig(**{**values, "device": _device(args.device)}))
    if args.json:
        _print_json(asdict(result))
    else:
        print(format_bench(result))


def _print_json(document: Any) -> None:
    """One JSON document, a list with a line an item; JSON has no NaN, a loss that diverged is null."""
    plain = json.loads(json.dumps(document), parse_constant=lambda constant: None)
    if isinstance(plain, list):
        print("[\n" + ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in plain) + "\n]")
    else:
        print(json.dumps(plain, ensure_ascii=False))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {reason(error)}") from None
    return name


_COMMANDS: dict[str, tuple[Callable[[], Parser], Callable[[Namespace], None]]] = {
    "models": (_models_parser, run_models),
    "train": (_train_parser, run_train),
    "evaluate": (_evaluate_parser, run_evaluate),
    "export": (_export_parser, run_export),
    "predict": (_predict_parser, run_predict),
    "cost": (_cost_parser, run_cost),
    "bench": (_bench_parser, run_bench),
}


def entry_point() -> NoReturn:
    """The installed command."""
    sys.exit(main())
