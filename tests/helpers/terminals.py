"""Commands in processes of their own, whose standard streams are of every kind. They start fast: see `processes`."""

from __future__ import annotations

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from dgnet._guard import run_process
from dgnet.cli import main
from tests.helpers.processes import FORK


@dataclass(frozen=True)
class Kind:
    """A kind of streams, and the exit status of a command that prints on stdout and is otherwise without mistakes."""

    status: int
    output: str = "file"  # file, closed, full, or pipe (closed by its reader)
    errors: str = "file"
    encoding: str = "utf-8"


KINDS = {
    "ASCII": Kind(0, encoding="ascii"),
    "latin-1": Kind(0, encoding="latin-1"),
    "closed stdout": Kind(1, output="closed"),
    "closed stderr": Kind(0, errors="closed"),
    "both closed": Kind(1, output="closed", errors="closed"),
    "full stdout": Kind(1, output="full"),
    "full stderr": Kind(0, errors="full"),
    "closed pipe": Kind(141, output="pipe"),
    "stderr to a closed pipe": Kind(0, errors="pipe"),
}


@dataclass(frozen=True)
class Done:
    """What a command left: exit status, and the bytes on stdout and stderr where they are files."""

    status: int | None
    output: bytes
    errors: bytes


def run_command(words: list[str], kind: Kind, folder: Path) -> Done:
    """Run a command with streams of `kind`."""
    paths = folder / "stdout", folder / "stderr"
    for path in paths:
        path.write_bytes(b"")
    process = FORK.Process(target=_run, args=(words, kind, [str(path) for path in paths], os.getcwd()))
    process.start()
    process.join(600)
    return Done(process.exitcode, *(path.read_bytes() for path in paths))


def _run(words: list[str], kind: Kind, paths: list[str], folder: str) -> None:
    os.chdir(folder)
    for number, name, path in ((1, kind.output, paths[0]), (2, kind.errors, paths[1])):
        if name == "pipe":
            reader, writer = os.pipe()
            os.close(reader)
            os.dup2(writer, number)
        elif name != "closed":
            os.dup2(os.open({"full": "/dev/full", "file": path}[name], os.O_WRONLY), number)
    for number, name in ((1, kind.output), (2, kind.errors)):
        if name == "closed":  # last: the next file that is opened takes its number
            os.close(number)
    sys.stdout = None if kind.output == "closed" else _open(1, kind.encoding, "strict")
    sys.stderr = None if kind.errors == "closed" else _open(2, kind.encoding, "backslashreplace")
    run_process(lambda: main(words))


def _open(number: int, encoding: str, errors: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.FileIO(number, "w"), encoding=encoding, errors=errors, line_buffering=number == 2)
