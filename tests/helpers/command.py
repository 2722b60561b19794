"""Calls of the command line in tests."""

from __future__ import annotations

from dgnet.cli import main
from dgnet.cli.command import Command, Group

QUICK = ["--model-kwargs", "{channels: [4, 4, 4]}", "--image-size", "8", "--batch-size", "4", "--lr", "0.05"]
"""Options of `dgnet train` with which it trains on a few images in about a second."""


def ask(capsys, *arguments: object) -> str:
    """Run the command, which must succeed. Returns its stdout."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert status == 0, errors
    return output


def refuse(capsys, *arguments: object) -> str:
    """Run the command, which must end with status 2 and one line on stderr. Returns this line."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert status == 2, (output, errors)
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("dgnet: ")
    return errors


def list_commands(commands: dict[str, Command | Group]) -> list[list[str]]:
    """The words of each command and of each group."""
    found = []
    for word, entry in commands.items():
        inner = list_commands(dict(entry.commands)) if isinstance(entry, Group) else []
        found += [[word], *([word, *words] for words in inner)]
    return found
