"""What every command shares: its parser, its options, how it prints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from jsonargparse import ArgumentParser, Namespace

from dgnet.errors import UsageError, reason
from dgnet.files import without_nan
from dgnet.options import flag


class Parser(ArgumentParser):
    """jsonargparse's parser whose errors are one line with a hint."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises UsageError in place of printing the usage and leaving."""
        line = " ".join(str(message).split())
        line = re.sub(r'^Parser key "([\w.]+)":', lambda match: f"--{match[1].replace('_', '-')}:", line)
        raise UsageError(line.replace("<class ", "").replace("'>.", "'."))


@dataclass(frozen=True)
class Command:
    """A command: how its parser is built, which imports what it needs, and what it does."""

    build: Callable[[], Parser]
    run: Callable[[Namespace], None]
    is_resumable: bool = False  # with --resume, `run` gets the options that were typed, no defaults
    sets_memory: bool = False  # whether freed memory is kept is its own affair


@dataclass(frozen=True)
class Group:
    """Commands under one word, as `dgnet detect train`."""

    description: str
    commands: Mapping[str, Command | Group]


def add_fields(parser: Parser, config: type[Any]) -> None:
    """An option for each field of the dataclass `config` that was made with `dgnet.options.option`."""
    hints = get_type_hints(config)
    for f in fields(config):
        if "help" in f.metadata:
            default = f.default if f.default_factory is MISSING else f.default_factory()
            parser.add_argument(flag(f.name), type=hints[f.name], default=default, help=f.metadata["help"])


def add_device(parser: Parser) -> None:
    """`--device`; `find_device` reads it."""
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, …")


def add_loader_options(parser: Parser) -> None:
    """The options of loading images in batches."""
    parser.add_argument("--batch-size", type=int, default=128, help="images a forward pass")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images; 0 loads in the main process")
    add_device(parser)


def print_json(document: Any) -> None:
    """One JSON document, a list with a line an item; see `without_nan`."""
    plain = without_nan(document)
    if isinstance(plain, list):
        print("[\n" + ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in plain) + "\n]")
    else:
        print(json.dumps(plain, ensure_ascii=False))


def find_device(name: str) -> str:
    """The device that `--device` names; raises UsageError where it cannot be used."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used here: {reason(error)}") from None
    return name


def say_if_idle(network: Any, path: Path) -> None:
    """One line on stderr where the sparse mode has nothing to leave out."""
    from dgnet.inference import can_skip

    if not can_skip(network):
        print(f"{path}: no edge or block can close, nothing will be skipped", file=sys.stderr)
