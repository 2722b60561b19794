"""The `dgnet` command. `COMMANDS` lists all commands; a command's file defines its options, calls the library and prints.

Exit status: 0 done; 2 a mistake in the request, explained in one line on stderr; 130 interrupted; 143 terminated; 141 the pipe
that it prints to was closed; 1 any other error.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import dgnet
from dgnet._guard import answer, run_process
from dgnet.cli import analyze, classify, compare, convert, detect, doctor, experiment, explore, publish, tools
from dgnet.cli.command import Command, Group, Parser
from dgnet.code import list_packages, trust_code
from dgnet.compat.argparse import option_strings
from dgnet.errors import UsageError, did_you_mean, reason
from dgnet.memory import keep_freed_memory

COMMANDS: dict[str, Command | Group] = {
    "models": tools.MODELS,
    "convert": convert.CONVERT,
    "train": classify.TRAIN,
    "evaluate": classify.EVALUATE,
    "compare": compare.COMPARE,
    "analyze": analyze.ANALYZE,
    "export": tools.EXPORT,
    "publish": publish.PUBLISH,
    "predict": classify.PREDICT,
    "detect": detect.DETECT,
    "experiment": experiment.EXPERIMENT,
    "explore": explore.EXPLORE,
    "cost": tools.COST,
    "bench": tools.BENCH,
    "doctor": doctor.DOCTOR,
}


# Libraries that call each other: their deprecation warnings are of no use to a user of the command.
DEPENDENCIES = ("datasets", "gradio", "lightning", "matplotlib", "onnxscript", "timm", "torch", "torchmetrics", "torchvision")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `dgnet`; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)

    def run() -> int:
        _check_current_folder()
        with warnings.catch_warnings():
            _ignore_deprecations()
            return _run(Group("Dynamic Graph Networks for vision.", COMMANDS), "dgnet", words)

    return answer(run)


def _check_current_folder() -> None:
    """Raises UsageError if the current folder was removed: libraries that torch loads end the process then."""
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(f"the current folder cannot be used: {reason(error)}; change to another with cd") from None


def _ignore_deprecations() -> None:
    """Ignore the deprecation warnings of dependencies, unless `python -W` or PYTHONWARNINGS sets a warning filter."""
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(DEPENDENCIES)})(\.|$)")


def _run(entry: Command | Group, name: str, words: list[str]) -> int:
    """Run the command or group `name` with the `words` that follow it; returns the exit status."""
    if isinstance(entry, Command):
        return _run_command(entry, name, words)
    if words and not words[0].startswith("-"):
        word, *rest = words
        if word not in entry.commands:
            hint = did_you_mean(word, entry.commands) or ";"
            what = " ".join([*name.split()[1:], word])
            raise UsageError(f"unknown command {what!r}{hint} commands: {', '.join(entry.commands)}")
        return _run(entry.commands[word], f"{name} {word}", rest)
    parser = _group_parser(entry, name)
    _check_options(name, words, parser)
    parser.parse_args(words)  # --help and --version exit here
    parser.print_help(sys.stderr)
    return 2


def _run_command(command: Command, name: str, words: list[str]) -> int:
    parser = command.build()
    parser.prog = name
    _check_options(name, words, parser)
    if command.has_processes:
        from dgnet.training import check_launcher

        check_launcher()
    if not command.sets_memory:
        keep_freed_memory()
    given = {word.partition("=")[0] for word in words}
    if command.is_resumable and {"--resume", "--config"} <= given:
        raise UsageError("--resume continues with the run's own config.yaml; leave out --config")
    args = parser.parse(words, defaults=not (command.is_resumable and "--resume" in given))
    try:
        with trust_code([*list_packages(args.get("trust_code"), "--trust-code"), *parser.typed_code]):
            return command.run(args) or 0
    except UsageError as error:
        error.args = (parser.spell(str(error)),)
        raise


def _group_parser(group: Group, name: str) -> Parser:
    """The parser that prints a group's help. It contains the parsers of all commands in the group."""
    parser = Parser(prog=name, description=group.description, exit_on_error=False)
    if name == "dgnet":
        parser.add_argument("--version", action="version", version=f"dgnet {dgnet.__version__}")
    subcommands = parser.add_subcommands(dest="command", required=False, metavar="COMMAND")
    for word, entry in group.commands.items():
        subparser = entry.build() if isinstance(entry, Command) else Parser(description=entry.description)
        subcommands.add_subcommand(word, subparser, help=subparser.description)
    return parser


def _check_options(command: str, words: Sequence[str], parser: Parser) -> None:
    """Raises UsageError for an unknown option, with the closest known one."""
    options = option_strings(parser)
    for word in itertools.takewhile(lambda word: word != "--", words):
        name = word.partition("=")[0].partition(".")[0]
        is_option = name.startswith("--") or (name[:1] == "-" and name[1:2].isalpha())
        if is_option and name not in options:
            raise UsageError(f"unknown option {name}{parser.hint(name, options)}; options: {command} --help")


def entry_point() -> NoReturn:
    """The installed command of versions before `dgnet.__main__` had it."""
    run_process(main)
