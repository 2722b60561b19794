"""`dgnet detect train`, `evaluate` and `predict`: object detection."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dgnet.cli.command import (
    Command,
    Group,
    Parser,
    add_checkpoint,
    add_device,
    add_json,
    add_loader_options,
    add_max_pixels,
    add_trust,
    apply_max_pixels,
    build_train_parser,
    describe_wirings,
    find_device,
    print_json,
    run_training,
    trust_words,
    warn_if_nothing_skips,
    write_then_print,
)
from dgnet.errors import UsageError, check_range
from dgnet.typed import Location

if TYPE_CHECKING:
    from dgnet.detection import DetectionResult


def _train_parser() -> Parser:
    from dgnet.detection import DetectConfig

    return build_train_parser(DetectConfig, "Train Faster R-CNN with a feature pyramid on data in COCO's format.")


def run_train(args: Namespace) -> None:
    """`dgnet detect train`."""
    from dgnet.detection import DetectConfig, train_detector

    result, config = run_training(args, DetectConfig, train_detector)
    if result is not None:
        ap, ap50 = (result.metrics[name] for name in ("val_ap", "val_ap50"))
        print(f"AP {ap:.2f}, AP50 {ap50:.2f} after {config.iterations:,} iterations; run folder: {result.folder}")
        print(f"evaluate it: dgnet detect evaluate {result.folder}{trust_words(config, '--trust-code')}")


def _evaluate_parser() -> Parser:
    parser = Parser(description="Compute COCO's average precision for a detector's checkpoint or for a file of results.")
    parser.add_argument("checkpoint", type=Location, help="run folder, .ckpt file or model.safetensors; or RESULTS.json")
    add_trust(parser)
    parser.add_argument(
        "--data", type=Location | None, default=None, help="annotations; by default those the run was evaluated on"
    )
    parser.add_argument("--images", type=Location | None, default=None, help="folder of the images; by default that of the run")
    add_loader_options(parser, batch_size=1)
    parser.add_argument("--mode", type=str, default="dense", help="dense, or sparse: blocks run only where they are alive")
    parser.add_argument(
        "--backend", type=str, default="pycocotools", help="pycocotools, or faster-coco-eval: the same figures, faster"
    )
    parser.add_argument(
        "--output", type=Location | None, default=None, help="JSON file to write the results to, in COCO's format"
    )
    add_json(parser)
    return parser


def run_evaluate(args: Namespace) -> None:
    """`dgnet detect evaluate`."""
    from dgnet.data import set_max_pixels
    from dgnet.detection import (
        CocoDetection,
        evaluate_detector,
        evaluate_results,
        load_detector,
        read_annotations,
        read_results,
        write_results,
    )
    from dgnet.evaluation import announce
    from dgnet.training import is_main_process, join_processes

    apply_max_pixels(args)
    connectivity: dict[str, float] = {}
    results = None
    if args.checkpoint.endswith(".json"):
        given = {"--output": args.output, "--images": args.images, "--mode": args.mode != "dense"}
        for option in (name for name, is_given in given.items() if is_given):
            raise UsageError(f"{option} needs a checkpoint, but {args.checkpoint} is a file of results; leave {option} out")
        if args.data is None:
            raise UsageError(f"{args.checkpoint} is a file of results: name its annotations with --data")
        annotations = read_annotations(args.data)
        precision = evaluate_results(annotations, read_results(args.checkpoint, annotations), backend=args.backend)
        title = f"{args.checkpoint} on {args.data}, {annotations.counts}"
    else:
        checkpoint = load_detector(args.checkpoint)
        data = args.data or checkpoint.data.val_data
        images = args.images or checkpoint.data.evaluation_images
        dataset = CocoDetection(data, images, class_names=checkpoint.class_names)
        detector = checkpoint.build()
        set_max_pixels(checkpoint.config.get("max_pixels"), is_default=True)
        if args.mode == "sparse":
            warn_if_nothing_skips(detector, checkpoint.path)
        with join_processes(find_device(args.device)) as device:
            found = evaluate_detector(detector, dataset, args.batch_size, args.workers, device, args.mode, args.backend)
            if not is_main_process():
                return
        precision, connectivity, results = found.precision, found.connectivity, found.results
        title = f"{checkpoint.path}: Faster R-CNN on {checkpoint.model}, {data}, {dataset.counts}"

    def write() -> None:
        if args.output and results is not None:
            write_results(args.output, results)
            print(f"results: {args.output}", file=sys.stderr)

    def show() -> None:
        if args.json:
            print_json({**asdict(precision), **connectivity})
        else:
            _print_precision(title, precision, connectivity)

    if args.json and results is not None:
        announce(dataset)
    write_then_print(write, show)


def _print_precision(title: str, precision: DetectionResult, connectivity: dict[str, Any]) -> None:
    print(title)
    figures = {
        "AP": precision.ap,
        "AP50": precision.ap50,
        "AP75": precision.ap75,
        "small": precision.ap_small,
        "medium": precision.ap_medium,
        "large": precision.ap_large,
    }
    print(", ".join(f"{name} {_percent(value)}" for name, value in figures.items()))
    width = max(5, *map(len, precision.by_class))
    print(f"{'class':{width}}" + "".join(f"{name:>8}" for name in figures))
    for name, own in precision.by_class.items():
        print(f"{name:{width}}" + "".join(f"{_percent(value):>8}" for value in own.values()))
    if connectivity:
        print(describe_wirings(connectivity))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _predict_parser() -> Parser:
    parser = Parser(description="Detect objects in images: draw them on the images, and write them in COCO's format.")
    add_checkpoint(parser)
    parser.add_argument("images", type=Location, nargs="+", metavar="IMAGE", help="image files, or folders of them")
    parser.add_argument("--output", type=Location, default="detections", help="folder for the drawings and results.json")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score of the objects drawn, 0 to 1")
    add_max_pixels(parser)
    add_device(parser)
    add_json(parser)
    return parser


def run_predict(args: Namespace) -> None:
    """`dgnet detect predict`."""
    from dgnet.data import escape
    from dgnet.detection import load_detector, predict_detections

    check_range("--score", args.score, 0, 1)
    apply_max_pixels(args)
    checkpoint = load_detector(args.checkpoint)
    drawn = predict_detections(checkpoint, args.images, Path(args.output), args.score, find_device(args.device))
    if args.json:
        print_json([asdict(image) for image in drawn])
        return
    for image in drawn:
        print(escape(f"{image.image}: {image.detections} objects -> {image.drawing}"))


DETECT = Group(
    "Object detection: Faster R-CNN with a feature pyramid on any network.",
    {
        "train": Command(_train_parser, run_train, is_resumable=True, has_processes=True),
        "evaluate": Command(_evaluate_parser, run_evaluate, has_processes=True),
        "predict": Command(_predict_parser, run_predict),
    },
)
