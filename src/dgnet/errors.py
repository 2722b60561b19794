"""The exception for mistakes of the user, and the checks that raise it."""

from __future__ import annotations

import difflib
import errno
import math
import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)


class UsageError(ValueError):
    """A mistake in the request. The message is one line: what was wrong, the value, what is allowed, what to do next.

    The command line prints the line and exits with status 2.
    """

    def __init__(self, message: str = "") -> None:
        if message.startswith("Caught "):  # a DataLoader raises a worker's error again
            from dgnet.compat.torch import message_from_worker  # not at the top: it imports torch

            message = message_from_worker(type(self), message)
        line = " ".join(line.strip() for line in message.strip().splitlines())
        super().__init__(_CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", line))


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")  # a value may hold them, and a terminal would obey them


class BadImageError(UsageError):
    """An image that cannot be read, does not decode, or does not match its annotations."""


class WriteError(UsageError):
    """A file that cannot be written. `problem`: which file and why; `is_full`: the disk has no space left for it.

    The message is the problem and `advice`.
    """

    def __init__(self, problem: str, advice: str = "", error: OSError | None = None) -> None:
        super().__init__(f"{problem}; {advice}" if advice else problem)
        self.problem = problem
        self.is_full = error is not None and error.errno in _FULL


class MachineError(RuntimeError):
    """An error whose cause is the machine, such as too little memory. The message is one line; the exit status is 1."""


class UnknownOptionError(UsageError):
    """A network has no option with this name, `option`."""

    def __init__(self, message: str, option: str = "") -> None:
        super().__init__(message)
        self.option = option


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """A hint like "; did you mean 'resnet50'?"; empty if no name is similar. The dashes of options do not count."""
    bare = {other.lstrip("-"): other for other in allowed}
    close = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.65)
    return f"; did you mean {bare[close[0]]!r}?" if close else ""


def check_choice(what: str, name: object, allowed: Iterable[str]) -> None:
    """Raises UsageError unless `name` is one of `allowed`."""
    allowed = list(allowed)
    if name not in allowed:
        hint = did_you_mean(str(name), allowed)
        listing = f"{'' if hint else ';'} allowed: {', '.join(allowed)}" if len(allowed) <= 20 else ""
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


_OF_MACHINE = (  # in the words of torch, which has no class for them
    ("can't allocate memory", "not enough memory"),
    ("Cannot allocate memory", "not enough memory"),
    (
        "failed to map segment",
        "a library cannot be loaded: not enough memory (`ulimit -v`), or not allowed to run files from there",
    ),
    ("out of memory", "not enough memory on the device"),
    ("Too many open files", "too many open files; raise the limit with `ulimit -n`, or lower --workers"),
    ("No space left on device", "no space left on the disk; free some"),
    ("Disk quota exceeded", "the disk quota is exceeded; free some space"),
    ("inline_container.cc", "a file cannot be written; is the disk full?"),
    ("unable to write to file", "no space left in shared memory (/dev/shm); lower --workers or --batch-size"),
    (
        "DataLoader worker (pid",
        "a process that loads images was ended from outside, perhaps for lack of memory; lower --workers",
    ),
)
_ASK_FOR_LESS = "; lower --batch-size, or the size of the images"


def describe_failure_of_machine(error: BaseException) -> str | None:
    """One line for an error whose cause is the machine: memory, disk, open files, network. None for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, MachineError):
        return text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        words = "not enough memory on the device" if "CUDA" in text else "not enough memory"
        return f"{words}{f' ({_first_sentence(text)})' if text else ''}{_ASK_FOR_LESS}"
    if isinstance(error, OSError) and not text.startswith("Caught "):
        where = "".join(f" {name}" for name in (error.filename, error.filename2) if name is not None)
        before = "the disk is full: " if error.errno in _FULL else ""
        after = "; raise the limit with `ulimit -n`, or lower --workers" if error.errno in (errno.EMFILE, errno.ENFILE) else ""
        return f"{before}{reason(error)}{where and f':{where}'}{after}"
    if isinstance(error, OSError | RuntimeError | ImportError):
        for words, meaning in _OF_MACHINE:
            if words in text:
                return meaning + (_ASK_FOR_LESS if meaning.startswith("not enough memory") else "")
    return reason(error) if isinstance(error, OSError) else None


def _first_sentence(text: str) -> str:
    """The first sentence of a long message, at most 120 characters."""
    return text.partition(". ")[0][:120]
