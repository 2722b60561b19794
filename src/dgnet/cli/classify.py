"""`dgnet train`, `evaluate` and `predict`: classification."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from dgnet.cli.command import (
    Command,
    Parser,
    add_device,
    add_json,
    add_loader_options,
    add_max_pixels,
    apply_max_pixels,
    build_train_parser,
    find_device,
    print_json,
    run_training,
    trust_words,
    warn_if_nothing_skips,
    write_then_print,
)
from dgnet.cli.weights import add_checkpoint_or_weights, find_results_folder, open_checkpoint, remark
from dgnet.errors import BadImageError, UsageError, check_choice, check_range
from dgnet.files import make_writable
from dgnet.typed import Location


def _train_parser() -> Parser:
    from dgnet.training import TrainConfig

    return build_train_parser(TrainConfig, "Train a network; without arguments, a small DG-Net on handwritten digits.")


def run_train(args: Namespace) -> None:
    """`dgnet train`."""
    from dgnet.training import TrainConfig, train

    result, config = run_training(args, TrainConfig, train)
    if result is not None:
        epochs = f"{config.epochs} epoch{'s' * (config.epochs != 1)}"
        print(f"top-1 {result.metrics['val_top1']:.2f} % after {epochs}; run folder: {result.folder}")
        print(f"evaluate it: dgnet evaluate {result.folder}{trust_words(config, '--trust-code')}")


def _evaluate_parser() -> Parser:
    parser = Parser(description="Evaluate a checkpoint: accuracy, executed cost and connectivity.")
    add_checkpoint_or_weights(parser)
    parser.add_argument("--data", type=Location | None, default=None, help="images; by default those the run was evaluated on")
    parser.add_argument(
        "--data-root", type=Location | None, default=None, help="folder that holds the torch/… and hfds/… data sets"
    )
    add_loader_options(parser)
    parser.add_argument(
        "--adjacency-controls",
        action="store_true",
        help="also evaluate every image with the mean weights, and with another image's weights",
    )
    parser.add_argument(
        "--mode", type=str, default="dense", help="dense, or sparse: each block runs only on the images for which it is alive"
    )
    parser.add_argument(
        "--executor",
        type=str,
        default="recommended",
        help="for the sparse mode: plain (PyTorch), native (C++ extension, on CPUs), or recommended (the faster on the device)",
    )
    parser.add_argument(
        "--threshold-offset", type=float | None, default=None, help="edges close below τ + offset, gates below ½ + offset"
    )
    parser.add_argument(
        "--inference-weight",
        type=str | None,
        default=None,
        help="weight of an open edge: gated (as in training) or raw (its α, Eq. 5); by default the checkpoint's",
    )
    parser.add_argument(
        "--write",
        type=Location | None,
        default=None,
        help="file to write a checkpoint to, with --threshold-offset or --inference-weight applied: FILE.safetensors",
    )
    parser.add_argument(
        "--sweep-threshold", action="store_true", help="measure accuracy, cost and time over threshold offsets; table and plot"
    )
    parser.add_argument(
        "--offsets",
        type=list[float] | None,
        default=None,
        help="offsets of the sweep, such as [-0.1, 0, 0.1]; by default 11 from -0.5 to 0.5",
    )
    parser.add_argument(
        "--output",
        type=Location | None,
        default=None,
        help="folder for the sweep's table and plot; by default the run folder, or for a published network the current one",
    )
    parser.add_argument(
        "--speed", action="store_true", help="also measure images/s of both modes and of the static baseline, in one run"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="with --speed: compile the networks (needs a C++ compiler; the first time takes about a minute)",
    )
    add_json(parser)
    return parser


def run_evaluate(args: Namespace) -> None:
    """`dgnet evaluate`."""
    from dgnet.evaluation import announce, describe_source, evaluate, open_evaluation_data
    from dgnet.training import is_main_process, join_processes

    _check_evaluate(args)
    apply_max_pixels(args)
    checkpoint, remarks = open_checkpoint(args)
    changes = _changes(args)
    if changes:
        checkpoint = replace(checkpoint, model_kwargs={**checkpoint.model_kwargs, **changes})
    network = checkpoint.build_network()
    dataset = open_evaluation_data(checkpoint, args.data, args.data_root)
    loading = {"batch_size": args.batch_size, "workers": args.workers}
    remark(remarks)
    if args.sweep_threshold:
        if is_main_process():  # under torchrun the others have nothing to do: the sweep measures times
            _sweep(args, network, dataset, loading)
        return
    if args.write and is_main_process():  # before the evaluation: a file that cannot be written is reported at once
        checkpoint.save(Path(args.write))
        words = ", ".join(f"{name} {value}" for name, value in changes.items())
        print(f"{args.write}: {checkpoint.model} with {words}", file=sys.stderr)
    if args.mode == "sparse":
        warn_if_nothing_skips(network, checkpoint.path)
    static = checkpoint.build_static() if args.speed else None
    with join_processes(find_device(args.device)) as device:
        announce(dataset)
        result = evaluate(
            network,
            dataset,
            device=device,
            adjacency_controls=args.adjacency_controls,
            mode=args.mode,
            static=static,
            speed=args.speed,
            compile=args.compile,
            executor=args.executor,
            **loading,
        )
        if not is_main_process():
            return
    if args.json:
        print_json(asdict(result))
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


def _changes(args: Namespace) -> dict[str, Any]:
    """The network's options that were given to `dgnet evaluate`; they take effect only in evaluation."""
    names = ("threshold_offset", "inference_weight")
    return {name: args[name] for name in names if args[name] is not None}


def _check_evaluate(args: Namespace) -> None:
    """Raises UsageError for options that cannot be combined."""
    from dgnet.inference import EXECUTORS, MODES

    check_choice("--mode", args.mode, MODES)
    check_choice("--executor", args.executor, EXECUTORS)
    needs = (
        ("--write", args.write, "--threshold-offset or --inference-weight", bool(_changes(args))),
        ("--offsets", args.offsets is not None, "--sweep-threshold", args.sweep_threshold),
        ("--output", args.output, "--sweep-threshold", args.sweep_threshold),
        ("--compile", args.compile, "--speed", args.speed),
        (
            f"--executor {args.executor}",
            args.executor != "recommended",
            "--mode sparse, --speed or --sweep-threshold",
            args.mode == "sparse" or args.speed or args.sweep_threshold,
        ),
    )
    for option, is_given, needed, is_there in needs:
        if is_given and not is_there:
            raise UsageError(f"{option} needs {needed}; add it, or leave {option} out")
    for option, is_given in (
        ("--threshold-offset", args.threshold_offset is not None),
        ("--speed", args.speed),
        ("--adjacency-controls", args.adjacency_controls),
        ("--write", args.write is not None),
    ):
        if args.sweep_threshold and is_given:
            raise UsageError(f"--sweep-threshold cannot be combined with {option}; leave one out")
    if args.write and not args.write.endswith(".safetensors"):
        raise UsageError(f"--write {args.write} must end in .safetensors")


def _sweep(args: Namespace, network: Any, dataset: Any, loading: dict[str, int]) -> None:
    """`dgnet evaluate --sweep-threshold`."""
    from dgnet.analysis import OFFSETS, format_sweep, save_sweep, sweep_thresholds
    from dgnet.evaluation import announce

    folder = Path(args.output) if args.output else find_results_folder(args.checkpoint)
    make_writable(folder)
    offsets, device = OFFSETS if args.offsets is None else args.offsets, find_device(args.device)
    announce(dataset)
    points = sweep_thresholds(network, dataset, offsets, device=device, executor=args.executor, **loading)
    paths: list[Path] = []

    def show() -> None:
        if args.json:
            print_json([asdict(point) for point in points])
            return
        print(format_sweep(points))
        print(f"times: sparse mode, batch {min(args.batch_size, len(dataset))}, on {device}")
        if paths:
            print(f"written: {', '.join(map(str, paths))}")
        print(f"to use an offset: dgnet evaluate {args.checkpoint} --threshold-offset X --write FILE.safetensors")

    write_then_print(lambda: paths.extend(save_sweep(points, folder)), show)


def _predict_parser() -> Parser:
    parser = Parser(description="Classify images: print the most probable classes of each.")
    add_checkpoint_or_weights(parser)
    parser.add_argument("images", type=Location, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--top-k", type=int, default=5, help="number of classes to print for each image")
    add_max_pixels(parser)
    add_device(parser)
    add_json(parser)
    return parser


def run_predict(args: Namespace) -> None:
    """`dgnet predict`."""
    from dgnet.data import escape
    from dgnet.evaluation import predict

    check_range("--top-k", args.top_k, 1)
    apply_max_pixels(args)
    checkpoint, remarks = open_checkpoint(args)
    bad: list[BadImageError] = []
    predictions = predict(checkpoint, args.images, args.top_k, find_device(args.device), bad)
    if predictions:
        remark(remarks)
    if predictions and args.json:
        print_json([asdict(prediction) for prediction in predictions])
    for prediction in predictions if not args.json else []:
        classes = ", ".join(
            f"{name} {100 * p:.1f} %" for name, p in zip(prediction.classes, prediction.probabilities, strict=True)
        )
        print(escape(f"{prediction.image}: {classes}"))
    if bad:
        images = len(bad) + len(predictions)
        raise BadImageError(f"{bad[0]}" + (f" ({len(bad):,} of {images:,} images do not decode)" if images > 1 else ""))


TRAIN = Command(_train_parser, run_train, is_resumable=True, has_processes=True)
EVALUATE = Command(_evaluate_parser, run_evaluate, has_processes=True)
PREDICT = Command(_predict_parser, run_predict)
