"""Private names of argparse. The parser of jsonargparse is a subclass of argparse's."""

from __future__ import annotations

from argparse import ArgumentParser


def option_strings(parser: ArgumentParser) -> list[str]:
    """All options of a parser as they are typed, such as "--lr". The public interface can add arguments, but not list them."""
    return [option for action in parser._actions for option in action.option_strings]
