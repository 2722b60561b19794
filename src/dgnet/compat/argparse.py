"""Private names of argparse. The parser of jsonargparse is a subclass of argparse's."""

from __future__ import annotations

from argparse import Action, ArgumentParser


def list_arguments(parser: ArgumentParser) -> list[Action]:
    """All arguments and options of a parser, in order. The public interface can add them, but not list them."""
    return list(parser._actions)


def option_strings(parser: ArgumentParser) -> list[str]:
    """All options of a parser as they are typed, such as "--lr"."""
    return [option for action in list_arguments(parser) for option in action.option_strings]
