"""Standard streams that a command can print to, whatever they are: of any encoding, closed, or on a full disk.

It imports nothing else of dgnet, and little of Python.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_is_pipe_closed = False


class Stream:
    """A text stream that escapes what its encoding cannot hold: é becomes \\xe9 in ASCII, a byte that is no UTF-8 \\udcff.

    `failure`: the error of the first write that failed. It is raised too if `raises`; otherwise what is written is lost.
    """

    def __init__(self, stream: Any, raises: bool) -> None:
        self.stream, self.raises = stream, raises
        self.failure: OSError | ValueError | None = None
        self.is_answered = False

    def write(self, text: str) -> int:
        """Write `text`."""
        try:
            return int(self.stream.write(escape(text, getattr(self.stream, "encoding", None) or "utf-8")) or 0)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._note(error)
            return len(text)

    def writelines(self, lines: Any) -> None:
        """Write every string of `lines`."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._note(error)

    def check(self) -> None:
        """Flush, and raise a failure that a library has ignored. Does nothing once the failure `is_answered`."""
        if self.is_answered:
            return
        if self.failure is not None:
            raise self.failure
        self.flush()

    def _note(self, error: OSError | ValueError) -> None:
        global _is_pipe_closed
        self.failure = self.failure or error
        _is_pipe_closed |= isinstance(error, BrokenPipeError)
        if self.raises:
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def escape(text: str, encoding: str = "utf-8") -> str:
    """`text` with escapes in place of what `encoding` does not have. UTF-8 lacks the bytes of a file name that is no UTF-8."""
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    return text


class _Missing(io.TextIOBase):
    """In place of a stream that is None."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def is_pipe_closed() -> bool:
    """Whether the reader of a pipe that this process prints to has closed it, since `forget_closed_pipe`."""
    return _is_pipe_closed


def forget_closed_pipe() -> None:
    """From now on `is_pipe_closed` is about later writes."""
    global _is_pipe_closed
    _is_pipe_closed = False


def error_stream() -> Stream:
    """`sys.stderr` as a stream that loses what cannot be written: a message never ends the work that it is about."""
    return sys.stderr if isinstance(sys.stderr, Stream) else Stream(sys.stderr or _Missing(), raises=False)


def say(line: str) -> None:
    """Print a line on stderr, if that is possible."""
    stream = error_stream()
    stream.write(f"{line}\n")
    stream.flush()


def say_once(line: str) -> None:
    """As `say`, but under torchrun only in the first process."""
    if int(os.environ.get("RANK", 0)) == 0:
        say(line)


@contextmanager
def safe_streams() -> Iterator[Stream]:
    """Inside the `with` block stdout and stderr are streams of this module. Yields stdout, whose failures are raised."""
    before = sys.stdout, sys.stderr
    output = before[0] if isinstance(before[0], Stream) else Stream(before[0] or _Missing(), raises=True)
    during = sys.stdout, sys.stderr = output, error_stream()
    try:
        yield output
    finally:
        # A command in another thread may have restored them, with a stream that this one has shared.
        if sys.stdout is during[0]:
            sys.stdout = before[0]
        if sys.stderr is during[1]:
            sys.stderr = before[1]


def describe_failure(error: OSError | ValueError) -> str:
    """The reason for which a stream cannot be written."""
    if isinstance(error, ValueError) or error.errno == errno.EBADF:
        return "it is closed"
    return error.strerror or type(error).__name__


def open_missing() -> None:
    """Open the standard streams that the process was started without (`dgnet … >&-`).

    Otherwise the next files that are opened, such as checkpoints, take their numbers, and libraries print into them. Writes to
    such an stdout fail; such an stderr loses them.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def discard_rest(*streams: Any) -> None:
    """Flush real streams; what cannot be written is lost. Otherwise Python complains about it when it exits."""
    for stream in streams:
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
