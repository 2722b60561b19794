"""What the commands for checkpoints share: the checkpoint, or weights without dgnet's description, with `--model`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from dgnet._streams import say_once
from dgnet.cli.command import Parser, add_checkpoint
from dgnet.errors import UsageError
from dgnet.options import LARGEST_SIDE, flag
from dgnet.paths import find_kind, is_folder
from dgnet.typed import Location

if TYPE_CHECKING:
    from dgnet.checkpoint import Checkpoint

_FOLLOW = ("dynamic", "model_kwargs", "class_names", "image_size")
"""Options that are for weights only: a checkpoint of dgnet says it itself."""


def add_checkpoint_or_weights(parser: Parser, nargs: str | None = None) -> None:
    """Add the argument for the checkpoint, and the options for weights only; `open_checkpoint` reads them."""
    add_checkpoint(parser, nargs)
    parser.moved.add("--weights")
    parser.recipe["model_kwargs"] = dict[str, Any]
    parser.add_argument(
        "--weights",
        type=Location | None,
        metavar="FILE",
        help="in place of CHECKPOINT: weights without dgnet's description, such as timm's; needs --model",
    )
    parser.add_argument("--model", type=str | None, default=None, help="with --weights: the network's name, timm's or dgnet's")
    parser.add_argument(
        "--dynamic",
        type=bool | None,
        default=None,
        help="with --weights: true makes the network dynamic, as dgnet convert does",
    )
    parser.add_argument("--model-kwargs", type=dict[str, Any], default={}, help="with --weights: model options, as a dict")
    parser.add_argument(
        "--class-names",
        type=Location | None,
        default=None,
        help="with --weights: text file with a class name on each line; by default ImageNet's, if the model's own are, or those"
        " of --data",
    )
    parser.add_argument(
        "--image-size",
        type=int | None,
        default=None,
        help="with --weights: side of the input in pixels; by default the model's own",
    )
    parser.bounds["image_size"] = (1, LARGEST_SIDE)


def open_checkpoint(args: Namespace) -> tuple[Checkpoint, list[str]]:
    """The checkpoint that `args` name, or the weights of `--model`, and lines that tell what the weights are taken for.

    Raises UsageError for a file that is neither, and for options of the one with the other.
    """
    from dgnet.checkpoint import load_checkpoint, read_weights
    from dgnet.data import number_classes, read_class_names

    if args.model is None:
        for name in _FOLLOW:
            if args[name] not in (None, {}):
                raise UsageError(f"{flag(name)} is for weights whose file does not say it; add --model NAME")
        return load_checkpoint(args.checkpoint), []
    kwargs = {**args.model_kwargs, **({} if args.dynamic is None else {"dynamic": args.dynamic})}
    names = None if args.class_names is None else read_class_names(Path(args.class_names))
    checkpoint, loaded = read_weights(args.checkpoint, args.model, kwargs, names, args.image_size)
    count = len(checkpoint.class_names)
    classes = f"{count:,} classes"
    if names is None and checkpoint.class_names == number_classes(count):
        own = _classes_of_data(args)
        if len(own) == count:
            checkpoint = replace(checkpoint, class_names=own)
        classes += f" in the order of {args.data}" if len(own) == count else " without names (give them with --class-names)"
    what = checkpoint.preprocessing
    lines = [
        f"{checkpoint.path}: weights of {checkpoint.model}, {classes} ({checkpoint.class_names[0]!r}, …),"
        f" {'×'.join(map(str, what.image_size))} pixels, {what.interpolation}, crop {what.crop_pct:g},"
        f" mean {[round(value, 4) for value in what.mean]}, std {[round(value, 4) for value in what.std]}"
    ]
    if loaded.resampled:
        lines.append(f"{checkpoint.path}: {loaded.resampled}")
    if loaded.untrained:
        from dgnet.training import describe_untrained

        lines.append(f"{checkpoint.path}: {describe_untrained(checkpoint.build_network(), loaded.untrained)}")
    return checkpoint, lines


def find_results_folder(checkpoint: str) -> Path:
    """Where commands write by default: in the run folder, beside the checkpoint file, or in the current folder.

    The latter is for a published network: its folder may be published again, and that of a download is a cache.
    """
    from dgnet.models import is_published

    if is_folder(checkpoint):
        return Path(checkpoint)
    return Path() if find_kind(checkpoint) is None and is_published(checkpoint) else Path(checkpoint).parent


def _classes_of_data(args: Namespace) -> list[str]:
    """The class names of `--data`; an empty list without it."""
    from dgnet.data import EVALUATION, open_dataset

    if args.get("data") is None:
        return []
    return open_dataset(args.data, EVALUATION, data_root=args.data_root or "data", needs_labels=False).class_names


def remark(lines: Sequence[str]) -> None:
    """Print the lines of `open_checkpoint` on stderr: when the work begins, so that a mistake is reported in one line."""
    for line in lines:
        say_once(line)
