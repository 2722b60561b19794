"""Files that are whole or not there, whatever stops the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """A path to write to inside the `with` block, which takes the place of `path` at its end.

    It lies beside `path`, on the same file system, and is on the disk before it is renamed. Where the block raises, `path`
    is as it was.
    """
    written = path.with_name(f".{path.name}.part")
    try:
        yield written
        with open(written, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too
        finally:
            os.close(folder)
    except BaseException:
        with suppress(OSError):
            written.unlink()
        raise
