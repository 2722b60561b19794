"""Named values: look one up, or say what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

from dgnet.errors import UsageError

T = TypeVar("T")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A hint like "; did you mean 'resnet50'?", empty where no name is close."""
    close = difflib.get_close_matches(name, list(allowed), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(what: str, name: object, allowed: Iterable[str]) -> None:
    """Raises UsageError unless `name` is one of `allowed`."""
    allowed = list(allowed)
    if name not in allowed:
        hint = did_you_mean(str(name), allowed)
        listing = f" allowed: {', '.join(allowed)}" if len(allowed) <= 20 else ""
        raise UsageError(f"unknown {what} {name!r}{hint or ';'}{listing}")


def lookup(what: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of `table` called `name`. Raises UsageError for an unknown name."""
    check_choice(what, name, table)
    return table[name]
