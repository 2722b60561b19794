"""The command as a user types it, for tests."""

from __future__ import annotations

from dgnet.cli import main

QUICK = ["--model-kwargs", "{channels: [4, 4, 4]}", "--image-size", "8", "--batch-size", "4", "--lr", "0.05"]
"""Options of `dgnet train` on a few images, in a second."""


def ask(capsys, *arguments: object) -> str:
    """What the command prints on stdout; it must succeed."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert status == 0, errors
    return output


def refuse(capsys, *arguments: object) -> str:
    """The one line with which the command refuses."""
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    assert status == 2, (output, errors)
    assert output == ""
    assert errors.count("\n") == 1
    assert errors.startswith("dgnet: ")
    return errors
