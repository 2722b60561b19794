"""The exception for mistakes of the user, and the checks that raise it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class UsageError(ValueError):
    """A mistake in the request. The message is one line: what was wrong, the value, what is allowed, what to do next.

    The command line prints the line and exits with status 2.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught "):  # a DataLoader raises a worker's error again
            from dgnet.compat.torch import message_from_worker  # not at the top: it imports torch

            message = message_from_worker(type(self), message)
        super().__init__(" ".join(line.strip() for line in message.strip().splitlines()))


class BadImageError(UsageError):
    """An image that cannot be read, does not decode, or does not match its annotations."""


class UnknownOptionError(UsageError):
    """A network has no option with this name, `option`."""

    def __init__(self, message: str, option: str = "") -> None:
        super().__init__(message)
        self.option = option


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A hint like "; did you mean 'resnet50'?"; empty if no name is similar."""
    close = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.65)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(what: str, name: object, allowed: Iterable[str]) -> None:
    """Raises UsageError unless `name` is one of `allowed`."""
    allowed = list(allowed)
    if name not in allowed:
        hint = did_you_mean(str(name), allowed)
        listing = f"; allowed: {', '.join(allowed)}" if len(allowed) <= 20 else ""
        if not hint and not listing:
            listing = f"; {len(allowed)} are allowed, such as {', '.join(allowed[:: len(allowed) // 5])}"
        raise UsageError(f"unknown {what} {name!r}{hint}{listing}")


def lookup(what: str, name: str, table: Mapping[str, T]) -> T:
    """The entry of `table` called `name`. Raises UsageError for an unknown name."""
    check_choice(what, name, table)
    return table[name]


def check_range(what: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises UsageError unless `value` is a finite number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{what} must be a number, got {value!r}")
    if not least <= value <= most:
        allowed = f"at least {least}" if most == math.inf else f"{least} to {most}"
        raise UsageError(f"{what} must be {allowed}, got {value}")


def shorten(text: str, most: int = 200) -> str:
    """`text` with its middle left out if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]}…{text[-most // 2 :]}"


def reason(error: BaseException) -> str:
    """The message of another library's exception, as one line of at most 200 characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
