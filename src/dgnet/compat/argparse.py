"""Private names of argparse. The parser of jsonargparse is a subclass of argparse's."""

from __future__ import annotations

import re
from argparse import ArgumentParser


def option_strings(parser: ArgumentParser) -> list[str]:
    """All options of a parser as they are typed, such as "--lr". The public interface can add arguments, but not list them."""
    return [option for action in parser._actions for option in action.option_strings]


def as_typed(message: str) -> str:
    """A message of jsonargparse as one line, with the option as it is typed: jsonargparse gives the attribute's name.

    Messages with another wording are returned as they are, on one line.
    """
    line = " ".join(message.split())
    line = re.sub(r'^Parser key "([\w.]+)":', lambda match: f"--{match[1].replace('_', '-')}:", line)
    return line.replace("<class ", "").replace("'>.", "'.")
