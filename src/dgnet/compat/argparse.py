"""Private names of argparse, and of jsonargparse, whose parser is argparse's."""

from __future__ import annotations

from argparse import ArgumentParser


def option_strings(parser: ArgumentParser) -> list[str]:
    """All options of a parser as they are typed, "--lr". The public interface adds arguments and does not list them."""
    return [option for action in parser._actions for option in action.option_strings]
