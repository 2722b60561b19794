"""What the commands share: parser, common options, printing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from dgnet._guard import report_end
from dgnet.compat.argparse import as_typed
from dgnet.errors import UsageError, reason
from dgnet.files import without_nan
from dgnet.options import flag

if TYPE_CHECKING:
    from dgnet.training import RunConfig, RunResult

C = TypeVar("C", bound="RunConfig")


class Parser(ArgumentParser):
    """jsonargparse's parser, with errors of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UsageError instead of printing the usage and exiting."""
        raise UsageError(as_typed(message))


@dataclass(frozen=True)
class Command:
    """A command of `dgnet`."""

    build: Callable[[], Parser]  # builds the parser; imports what the options need
    run: Callable[[Namespace], None]  # does the work
    is_resumable: bool = False  # if True, `run` gets only the options typed by the user, without defaults, for --resume
    sets_memory: bool = False  # if True, the command itself decides whether to call `keep_freed_memory`


@dataclass(frozen=True)
class Group:
    """Commands under a common first word, such as `dgnet detect train`."""

    description: str
    commands: Mapping[str, Command | Group]


def add_fields(parser: Parser, config: type[Any]) -> None:
    """Add an option for each field of the dataclass `config` that was made with `dgnet.options.option`."""
    hints = get_type_hints(config)
    for f in fields(config):
        if "help" in f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            parser.add_argument(flag(f.name), type=hints[f.name], default=default, help=f.metadata["help"])


def build_train_parser(config: type[RunConfig], description: str) -> Parser:
    """The parser of a training command with the options of the dataclass `config`."""
    parser = Parser(description=description)
    parser.add_argument("--config", action=ActionConfigFile, help="recipe: a YAML file of these options")
    parser.add_argument("--resume", type=str | None, default=None, metavar="RUN", help="continue the run in this folder")
    add_fields(parser, config)
    return parser


def run_training(args: Namespace, kind: type[C], train: Callable[[C, Path | None], RunResult]) -> tuple[RunResult | None, C]:
    """Train, or continue with `--resume`. Returns the result (None except in the main process) and the configuration.

    If a signal ended the run, exits with status 128 plus the signal's number.
    """
    from dgnet.training import Interrupted, is_main_process, read_run

    resume = Path(args.resume) if args.get("resume") is not None else None
    values = {f.name: args[f.name] for f in fields(kind) if f.name in args}
    result = None
    if resume is not None:
        config, result = read_run(resume, values, kind)
    else:
        config = kind(**values)
    try:
        if result is None:
            result = train(config, resume)
        else:
            print(f"{resume} is finished; there is nothing to continue", file=sys.stderr)
    except Interrupted as error:
        if is_main_process():
            is_kept = (error.folder / "config.yaml").exists()
            how = f"; continue with: dgnet {kind.command} --resume {error.folder}" if is_kept else ""
            report_end(f"dgnet: {error}{how}")
        raise SystemExit(128 + error.signum) from None
    return (result if is_main_process() else None), config


def add_checkpoint(parser: Parser) -> None:
    """Add the argument for the checkpoint."""
    parser.add_argument("checkpoint", type=str, help="run folder, .ckpt file or model.safetensors")


def add_json(parser: Parser) -> None:
    """Add `--json`; `print_json` prints the document."""
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def add_device(parser: Parser) -> None:
    """Add `--device`; `find_device` reads it."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")


def add_loader_options(parser: Parser, batch_size: int = 128) -> None:
    """Add the options for loading images in batches."""
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per forward pass")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images; 0 loads in the main process")
    add_device(parser)


def print_json(document: Any) -> None:
    """Print one JSON document, with one line per item if it is a list; see `without_nan`."""
    plain = without_nan(document)
    if isinstance(plain, list):
        print("[\n" + ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in plain) + "\n]")
    else:
        print(json.dumps(plain, ensure_ascii=False))


def find_device(name: str) -> str:
    """The device for the value of `--device`. Raises UsageError if it cannot be used."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used on this machine: {reason(error)}") from None
    return name


def describe_wirings(figures: Mapping[str, Any], at_least: str = "") -> str:
    """One line with figures from `WiringStatistics.summary`."""
    return (
        f"closed edges {100 * figures['closed_edges']:.2f} %, distinct wirings {at_least}{figures['distinct_wirings']:,},"
        f" spread of an edge's weight {figures['weight_std']:.4f}"
    )


def warn_if_nothing_skips(network: Any, path: Path) -> None:
    """Print one line on stderr if the sparse mode has nothing to skip."""
    from dgnet.inference import can_skip

    if not can_skip(network):
        print(f"{path}: no edge or block can close, so nothing will be skipped", file=sys.stderr)
