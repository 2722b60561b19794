"""The `dgnet` command: parses, calls, prints. A command is in `COMMANDS`; its file has its options and what it prints.

Exit status: 0 done; 2 a mistake in what was asked for, in one line on stderr; 130 interrupted, 143 terminated; 141 nobody reads
what it prints; 1 anything else.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import dgnet
from dgnet.cli import analyze, classify, detect, explore, tools
from dgnet.cli.command import Command, Group, Parser
from dgnet.compat.argparse import option_strings
from dgnet.errors import UsageError, did_you_mean, reason
from dgnet.memory import keep_freed_memory

COMMANDS: dict[str, Command | Group] = {
    "models": tools.MODELS,
    "train": classify.TRAIN,
    "evaluate": classify.EVALUATE,
    "analyze": analyze.ANALYZE,
    "export": tools.EXPORT,
    "predict": classify.PREDICT,
    "detect": detect.DETECT,
    "explore": explore.EXPLORE,
    "cost": tools.COST,
    "bench": tools.BENCH,
}


# Whose deprecation warnings are of no use to a user of the command: one library calls another.
DEPENDENCIES = ("datasets", "gradio", "lightning", "matplotlib", "onnxscript", "timm", "torch", "torchmetrics", "torchvision")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dgnet`; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            _ignore_deprecations()
            status = _run(Group("Dynamic Graph Networks for vision.", COMMANDS), "dgnet", words)
        sys.stdout.flush()
        return status
    except UsageError as error:
        print(f"dgnet: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dgnet: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return leave_pipe()


def _ignore_deprecations() -> None:
    """Ignore the deprecation warnings of dependencies, unless `python -W` or PYTHONWARNINGS says what to do with warnings."""
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(DEPENDENCIES)})(\.|$)")


def leave_pipe() -> int:
    """Where the reader of a pipe had enough: what is not written yet goes nowhere; returns the exit status for it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    return 128 + signal.SIGPIPE


def _run(entry: Command | Group, name: str, words: list[str]) -> int:
    """Run `name`, a command or a group of them, with the `words` that follow it."""
    if isinstance(entry, Command):
        _run_command(entry, name, words)
        return 0
    if words and not words[0].startswith("-"):
        word, *rest = words
        if word not in entry.commands:
            hint = did_you_mean(word, entry.commands) or ";"
            what = " ".join([*name.split()[1:], word])
            raise UsageError(f"unknown command {what!r}{hint} commands: {', '.join(entry.commands)}")
        return _run(entry.commands[word], f"{name} {word}", rest)
    parser = _group_parser(entry, name)
    _check_options(name, words, parser)
    parser.parse_args(words)  # --help and --version leave here
    parser.print_help(sys.stderr)
    return 2


def _run_command(command: Command, name: str, words: list[str]) -> None:
    parser = command.build()
    parser.prog = name
    _check_options(name, words, parser)
    if not command.sets_memory:
        keep_freed_memory()
    given = {word.partition("=")[0] for word in words}
    if command.is_resumable and {"--resume", "--config"} <= given:
        raise UsageError("--resume goes on as config.yaml of the run says: leave out --config")
    command.run(parser.parse_args(words, defaults=not (command.is_resumable and "--resume" in given)))


def _group_parser(group: Group, name: str) -> Parser:
    """The parser that prints a group's help; building it builds those of all its commands."""
    parser = Parser(prog=name, description=group.description, exit_on_error=False)
    if name == "dgnet":
        parser.add_argument("--version", action="version", version=f"dgnet {dgnet.__version__}")
    subcommands = parser.add_subcommands(dest="command", required=False, metavar="COMMAND")
    for word, entry in group.commands.items():
        subparser = entry.build() if isinstance(entry, Command) else Parser(description=entry.description)
        subcommands.add_subcommand(word, subparser, help=subparser.description)
    return parser


def _check_options(command: str, words: Sequence[str], parser: Parser) -> None:
    """Raises UsageError, with the nearest name, for an unknown option, and with its name for a recipe that is no YAML."""
    options = option_strings(parser)
    for word, following in zip(words, [*words, ""][1:], strict=True):
        name, _, value = word.partition("=")
        if name == "--config" and os.path.isfile(path := value or following):
            _check_yaml(path)
        name = name.partition(".")[0]
        if name.startswith("--") and name != "--" and name not in options:
            raise UsageError(f"unknown option {name}{did_you_mean(name, options)}; options: {command} --help")


def _check_yaml(path: str) -> None:
    import yaml

    try:
        yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} is no valid YAML: {reason(error)}") from None


def entry_point() -> NoReturn:
    """The installed command."""
    sys.exit(main())
