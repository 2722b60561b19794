"""Private names of argparse, and of jsonargparse, whose parser is argparse's."""

from __future__ import annotations

import re
from argparse import ArgumentParser


def option_strings(parser: ArgumentParser) -> list[str]:
    """All options of a parser as they are typed, "--lr". The public interface adds arguments and does not list them."""
    return [option for action in parser._actions for option in action.option_strings]


def as_typed(message: str) -> str:
    """A message of jsonargparse's as one line, with the option as it is typed: it names the attribute, in words of its own.

    What is worded in another way is kept.
    """
    line = " ".join(message.split())
    line = re.sub(r'^Parser key "([\w.]+)":', lambda match: f"--{match[1].replace('_', '-')}:", line)
    return line.replace("<class ", "").replace("'>.", "'.")
