"""Paths: from the text that a user typed or that a file holds, to what is there.

No other module asks the file system what a path is: these functions answer in one line where it cannot be found out.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dgnet.errors import UsageError, reason, shorten


def expand(path: str | Path) -> Path:
    """A path with `~` and `~USER` expanded.

    Raises UsageError for an empty path, for one with a NUL character, and for a home folder that does not exist.
    """
    text = str(path)
    if not text or "\0" in text:
        raise UsageError(f"{text!r} is no path")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(f"{shorten(text)}: there is no such home folder; write the path in full") from None


def absolute(path: str | Path) -> str:
    """The path, expanded and absolute: as a file stores it that is read from other folders. Links are not resolved.

    Raises UsageError as `expand` does.
    """
    return os.path.abspath(expand(path))


def find_kind(path: str | Path) -> str | None:
    """What is at `path`, links followed: "file", "folder", "special" (a pipe, socket or device), or None if there is nothing.

    A link that leads nowhere, or to itself, is nothing.

    Raises UsageError if that cannot be found out: a part of the path may not be entered, or is too long.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        if isinstance(error, OSError) and error.errno == errno.ELOOP:
            return None
        raise UsageError(f"{shorten(str(path))} cannot be read: {reason(error)}") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


def is_file(path: str | Path) -> bool:
    """Whether a regular file is at `path`. Raises UsageError as `find_kind` does."""
    return find_kind(path) == "file"


def is_folder(path: str | Path) -> bool:
    """Whether a folder is at `path`. Raises UsageError as `find_kind` does."""
    return find_kind(path) == "folder"


def list_folder(path: str | Path) -> list[Path]:
    """The entries of a folder, sorted. Raises UsageError if it cannot be read."""
    with reading(path):
        return sorted(Path(path).iterdir())


def scan_folder(path: str | Path) -> list[tuple[str, bool]]:
    """The names in a folder, in no particular order, and whether each is a folder, links followed. Does not look at each file.

    A link that leads nowhere is no folder. Raises UsageError if the folder cannot be read.
    """
    found = []
    with reading(path), os.scandir(path) as entries:
        for entry in entries:
            try:
                found.append((entry.name, entry.is_dir()))
            except OSError:
                if not entry.is_symlink():  # a link may lead to itself
                    raise
                found.append((entry.name, False))
    return found


def is_broken_link(path: str | Path) -> bool:
    """Whether a link is at `path` that leads nowhere."""
    return os.path.islink(path) and not os.path.exists(path)


@contextmanager
def reading(source: object) -> Iterator[None]:
    """Raises UsageError, with `source`, if something cannot be read inside the `with` block."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{shorten(str(source))} cannot be read: {reason(error)}") from None


_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")
"""Where a shell puts the pipe of `command <(…)`; somebody writes to it. Other pipes may never be written to."""


def read_bytes(path: str | Path, what: str = "") -> bytes:
    """The content of a file. `what`: how messages call it, before its path.

    Raises UsageError if it cannot be read, or is a pipe or device that a shell did not open.
    """
    source = _name(path, what)
    if find_kind(path) == "special" and not str(path).startswith(_STREAMS):
        raise UsageError(f"{source} cannot be read: it is no regular file")
    with reading(source):
        return Path(path).read_bytes()


def read_text(path: str | Path, what: str = "") -> str:
    """The text of a UTF-8 file, with or without a byte order mark. `what`: as for `read_bytes`.

    Raises UsageError if it cannot be read or is not UTF-8.
    """
    try:
        return read_bytes(path, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{_name(path, what)} cannot be read: it is not UTF-8 text (byte {error.start:,})") from None


def _name(path: str | Path, what: str) -> str:
    return f"{what} {shorten(str(path))}".strip()
