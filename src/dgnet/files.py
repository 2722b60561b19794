"""Write files completely or not at all, even if the process is stopped; locks, tables."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dgnet.errors import UsageError, reason
from dgnet.paths import find_kind, read_text


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to inside the `with` block, which replaces `path` at the end of the block.

    It is in the folder of `path`. Its content is on the disk before it is renamed. If the block raises, `path` is unchanged.
    """
    written = path.with_name(f".{path.name}.part")
    try:
        written.touch()
        mode = written.stat().st_mode  # as the user's umask has it; some libraries write files that nobody else may read
        yield written
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(written, mode)
        os.replace(written, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # write the new name to the disk too
        finally:
            os.close(folder)
    except BaseException:
        with suppress(OSError):
            written.unlink()
        raise


@contextmanager
def writing(target: object, advice: str = "name another with --output") -> Iterator[None]:
    """Raises UsageError, with `target` and `advice`, if something cannot be written inside the `with` block."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {reason(error)}; {advice}") from None


def make_writable(folder: Path) -> None:
    """Make `folder`, before the work whose results go there. Raises UsageError if it cannot be written to."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


@contextmanager
def lock(path: Path, refusal: str, seconds: float = 0.0) -> Iterator[None]:
    """Lock `path`, a file or a folder, inside the `with` block. Other processes that lock it wait, or raise an error.

    Raises UsageError with `refusal` if another process still has the lock after `seconds`. If the system or the file system has
    no locks, this does nothing.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    end = time.monotonic() + seconds
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise UsageError(refusal) from None
                time.sleep(0.1)
            except OSError:
                break
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: forked processes hold the lock too
        os.close(descriptor)


def without_nan(document: Any) -> Any:
    """`document` with null for NaN and infinity, which JSON does not have; a loss may have diverged."""
    return json.loads(json.dumps(document), parse_constant=lambda constant: None)


def read_table(path: Path, needed: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a CSV file; none if there is no file. `needed`: the columns that it must have.

    Raises UsageError for a file that is not such a table.
    """
    if find_kind(path) is None:
        return []
    table = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        rows, columns = list(table), table.fieldnames or ()
    except csv.Error as error:
        raise UsageError(f"{path} is no table of comma-separated values: {reason(error)}") from None
    for name in needed:
        if name not in columns:
            raise UsageError(f"{path} lacks the column {name}")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UsageError(f"{path}: row {number} has another number of cells than the header")
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as a CSV file. `columns`: by default all, in order of appearance. A cell is empty if its row has no value."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as written, written.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
