"""`dgnet convert`: make a static network dynamic without changing its function."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dgnet.cli.command import (
    Command,
    Parser,
    add_json,
    add_loader_options,
    apply_max_pixels,
    find_device,
    print_json,
)
from dgnet.errors import UsageError
from dgnet.files import make_writable
from dgnet.options import LARGEST_SIDE
from dgnet.paths import find_kind, list_folder
from dgnet.presets import PRESETS
from dgnet.typed import Location

if TYPE_CHECKING:
    from dgnet.checkpoint import Checkpoint


def _parser() -> Parser:
    parser = Parser(
        description="Make a static network dynamic without changing its function; print what becomes dynamic and what it costs."
    )
    parser.recipe["model_kwargs"] = dict[str, Any]
    parser.add_argument("model", type=str, metavar="NAME", help="name of a static network of timm or dgnet")
    parser.add_argument("--weights", type=Location | None, default=None, help="its weights: a file, or a run of dgnet train")
    parser.add_argument("--pretrained", type=bool, default=False, help="true: the weights that timm publishes for it")
    parser.add_argument(
        "--check",
        type=Location,
        nargs="+",
        default=None,
        metavar="PHOTOS",
        help="compare both networks on these photos: image files, or a folder of them or of class folders, shards, …",
    )
    parser.add_argument(
        "--output", type=Location | None, default=None, metavar="RUN", help="folder to write the converted network to"
    )
    parser.add_argument(
        "--topology",
        type=str | None,
        default=None,
        help="which edges exist; only complete, the default, keeps the function",
    )
    parser.add_argument(
        "--weighting",
        type=str | None,
        default=None,
        help="how edges are weighted: routed (the default), signed, linear, softmax, learned, fixed",
    )
    parser.add_argument(
        "--node-gate",
        type=str | None,
        default=None,
        help="gates on blocks: none (the default; training to a budget adds them), hard, gumbel",
    )
    parser.add_argument(
        "--preset",
        type=str | None,
        default=None,
        help=f"connectivity in the form of another network: {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--stages",
        type=str,
        nargs="+",
        default=["auto"],
        metavar="MODULE",
        help="modules whose blocks become stages, also blocks without a shortcut; by default all runs of residual blocks",
    )
    parser.add_argument(
        "--model-kwargs", type=dict[str, Any], default={}, help="further options of the network and its stages, as a dict"
    )
    parser.add_argument(
        "--image-size", type=int | None, default=None, help="side of the input in pixels; by default the network's own"
    )
    parser.add_argument(
        "--num-classes", type=int | None, default=None, help="number of classes; by default that of the weights or the network"
    )
    parser.bounds |= {"image_size": (1, LARGEST_SIDE), "num_classes": (1,)}
    add_loader_options(parser)
    add_json(parser)
    return parser


def run_convert(args: Namespace) -> None:
    """`dgnet convert`."""
    from dgnet._describe import describe
    from dgnet.models import Connectivity, convert

    _check(args)
    apply_max_pixels(args)
    device = find_device(args.device)
    kwargs = dict(args.model_kwargs)
    options = {name: kwargs.pop(name) for name in Connectivity.names() if name in kwargs}
    checkpoint, remark = _open_static(args, kwargs)
    static, size = checkpoint.build_network(), checkpoint.preprocessing.image_size
    converted: Any = convert(
        static,
        topology=args.topology,
        weighting=args.weighting,
        node_gate=args.node_gate,
        preset=args.preset,
        stages="auto" if args.stages == ["auto"] else args.stages,
        image_size=size,
        **options,
    )
    if remark:
        print(f"{args.weights}: {remark}", file=sys.stderr)
    if args.check is not None:
        agreement = _compare(args, checkpoint, static, converted, device)
        converted.conversion = replace(converted.conversion, agreement=agreement)
    weights = args.output or args.weights or "FILE"
    described = describe(converted, size, name=args.model, weights=weights, model_kwargs={**kwargs, **options})
    if args.output is not None:
        stored = replace(
            checkpoint,
            state_dict=converted.state_dict(),
            model_kwargs={**checkpoint.model_kwargs, **converted.stored_options()},
        )
        folder = Path(args.output)
        make_writable(folder)
        stored.save(folder / "model.safetensors")
        print(f"{folder}: the converted network, for dgnet evaluate, predict, analyze, explore and export", file=sys.stderr)
    if args.json:
        print_json(asdict(described))
    else:
        print(described)


def _check(args: Namespace) -> None:
    """Raises UsageError for options that cannot be combined, and for an output that holds something already."""
    from dgnet.models import list_models

    if args.model.partition(".")[0] in list_models("dg_*"):
        raise UsageError(f"{args.model} is dynamic already; train it with: dgnet train --model {args.model}")
    if args.weights and args.pretrained:
        raise UsageError("--weights and --pretrained true both give weights; leave one out")
    if args.weights and args.num_classes is not None:
        raise UsageError("--num-classes follows from --weights; leave it out")
    if args.output and not (args.weights or args.pretrained):
        raise UsageError("--output needs --weights FILE or --pretrained true: without weights there is nothing to keep")
    if args.output and find_kind(args.output) not in (None, "folder"):
        raise UsageError(f"--output {args.output} is a file; name a folder")
    if args.output and find_kind(args.output) and list_folder(Path(args.output)):
        raise UsageError(f"--output {args.output} is not empty; name another folder")


def _open_static(args: Namespace, kwargs: Mapping[str, Any]) -> tuple[Checkpoint, str]:
    """The static network with its weights, and a line on how they were loaded, or "". Raises UsageError if they do not fit."""
    from dgnet.checkpoint import open_model, read_static

    if args.weights is None:
        return open_model(args.model, kwargs, args.num_classes, args.image_size, args.pretrained), ""
    checkpoint, loaded = read_static(args.weights, args.model, kwargs, args.image_size)
    return checkpoint, loaded.resampled


def _compare(args: Namespace, checkpoint: Checkpoint, static: Any, converted: Any, device: str) -> Any:
    """Compare the networks on the photos of `--check`. Raises UsageError if they differ."""
    from dgnet.evaluation import announce, compare_networks, open_photos

    dataset, remark = open_photos(checkpoint, args.check)
    announce(dataset)
    if remark:
        print(remark, file=sys.stderr)
    agreement = compare_networks(static, converted, dataset, args.batch_size, args.workers, device)
    agreement.require(checkpoint.model)
    return agreement


CONVERT = Command(_parser, run_convert)
