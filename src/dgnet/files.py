"""Write files completely or not at all, even if the process is stopped; locks, tables."""

from __future__ import annotations

import codecs
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

from dgnet.errors import UsageError, WriteError, reason
from dgnet.paths import find_kind, read_text


def part_of(path: Path) -> Path:
    """Where `replace_file` writes the new content of `path`. A process that is killed leaves this file."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to inside the `with` block, which replaces `path` at the end of the block.

    It is in the folder of `path`. Its content is on the disk before it is renamed. If the block raises, `path` is unchanged.
    """
    written = part_of(path)
    try:
        written.touch()
        mode = written.stat().st_mode  # as the user's umask has it; some libraries write files that nobody else may read
        yield written
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(written, mode)
        os.replace(written, path)
        _sync_folder(path.parent)  # write the new name to the disk too
    except BaseException:
        with suppress(OSError):
            written.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Write the names in `folder` to the disk. Windows cannot open a folder, and some file systems do not sync one."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replace_content(path: Path) -> Iterator[io.FileIO]:
    """A file to write to inside the `with` block, whose content replaces that of `path` as with `replace_file`.

    If a write fails, its OSError is raised, whatever the library that wrote makes of it.
    """
    with replace_file(path) as written, _Target(written) as file:
        try:
            yield file
        except Exception:
            if file.failure is not None:
                raise file.failure from None
            raise


class _Target(io.FileIO):
    """A file to write. `failure`: the error of the operating system, if a write failed."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w")
        self.failure: OSError | None = None

    def write(self, content: Any) -> int:
        rest = memoryview(content).cast("B")
        size = len(rest)
        try:
            while rest:  # a disk that is almost full writes only a part
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.failure = error
            raise
        return size


@contextmanager
def writing(target: object, advice: str = "name another with --output") -> Iterator[None]:
    """Raises WriteError, a UsageError with `target` and `advice`, if something cannot be written inside the `with` block."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{target} cannot be written: {reason(error)}", advice, error) from None


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


def to_json(document: Any, encoding: str = "utf-8", indent: int | None = None) -> str:
    """`document` as JSON that can be written in `encoding`: escaped if it is not UTF-8, or holds a file name that is not."""
    text = json.dumps(document, ensure_ascii=codecs.lookup(encoding).name != "utf-8", indent=indent)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(document, indent=indent)
    return text


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
    for name in columns:
        if columns.count(name) > 1:
            raise UsageError(f"{path} has the column {name!r} twice; remove one")
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise UsageError(f"{path}: row {number} has another number of cells than the header")
    return rows


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as a CSV file. `columns`: by default all, in order of appearance. A cell is empty if its row has no value."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as written, written.open("w", encoding="utf-8", newline="", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
