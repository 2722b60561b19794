"""Tar files read with care: a damaged or forged file ends in one line, without a wait and without much memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager

from dgnet.data._ledger import Ledger, escape
from dgnet.errors import UsageError, reason

_MOST_HEADER = 2**20  # bytes of a header, such as a long name; a forged one may claim gigabytes
_MOST_MEMBER = 2**30  # bytes of an image
_MOST_TAIL = 2**20  # bytes that are looked at after the end mark
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


def find_compression(start: bytes) -> str | None:
    """The compression of a file that begins with `start`; None if it is not compressed."""
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)


def decompress(file: io.RawIOBase) -> io.BufferedIOBase:
    """The content of a stream, decompressed if it is compressed with gzip, bzip2 or xz."""
    buffered = io.BufferedReader(file)
    kind = find_compression(buffered.peek(8)[:8])
    if kind == "gzip":
        return gzip.GzipFile(fileobj=buffered)
    if kind == "bzip2":
        return bz2.BZ2File(buffered)
    if kind == "xz":
        return lzma.LZMAFile(buffered)
    if kind is not None:
        raise UsageError(f"it is compressed with {kind}; allowed are gzip, bzip2 and xz")
    return buffered


class _Input:
    """What tarfile reads: a file, or a stream that is read forwards only. A single read is limited to `limit` bytes."""

    def __init__(self, file: io.BufferedIOBase, size: int | None) -> None:
        self.file, self.size = file, size  # the size is None for a stream
        self.position = 0
        self.limit = _MOST_HEADER
        self.last = b""  # what was read last

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer only at the end."""
        if not 0 <= count <= self.limit:
            raise tarfile.ReadError(f"a header of {count:,} bytes")
        parts = []
        while count:
            part = self.file.read(count)
            if not part:
                break
            parts.append(part)
            count -= len(part)
        self.last = b"".join(parts)
        self.position += len(self.last)
        return self.last

    def tell(self) -> int:
        return self.position

    def seekable(self) -> bool:
        return self.size is not None

    def seek(self, position: int, whence: int = 0) -> int:
        """Move to `position`, counted from the start."""
        if self.size is not None:
            self.file.seek(position)
            self.position = position
        elif position < self.position:
            raise tarfile.ReadError("a member that lies before the one that was read last")
        while self.position < position:
            if not self.read(min(position - self.position, _MOST_HEADER)):
                break
        return self.position


class TarReader:
    """Iterates over the members of a tar file; `read` gives the content of the current one.

    `path`: for messages. `size`: of a file in bytes; None for a stream.

    Raises UsageError for a file that is damaged, cut short or forged.
    """

    def __init__(self, file: io.BufferedIOBase, path: str, size: int | None, ledger: Ledger) -> None:
        self.path, self.ledger = path, ledger
        self.input = _Input(file, size)

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        with self.naming_errors():
            tar = tarfile.TarFile(fileobj=self.input)  # type: ignore[arg-type]
        while True:
            with self.naming_errors():
                member = tar.next()
            if member is None:
                break
            self._check(member)
            yield member
        self._check_end()

    def _check(self, member: tarfile.TarInfo) -> None:
        if member.size < 0:
            name = escape(member.name)
            raise UsageError(f"{self.path} is damaged: its member {name} has a size of {member.size:,} bytes; copy it again")
        if member.isreg() and self.input.size is not None and not member.issparse():
            end = member.offset_data + member.size
            if end > self.input.size:
                name = escape(member.name)
                raise UsageError(
                    f"{self.path} is cut short: its member {name} ends at byte {end:,} of {self.input.size:,}; copy it again"
                )

    def check_content(self, member: tarfile.TarInfo) -> None:
        """Raises UsageError if the content of `member` cannot be read as one block of bytes of a usual size."""
        if member.issparse():
            name = escape(member.name)
            raise UsageError(
                f"{self.path}: its member {name} is stored with holes (a sparse file); write the shard again without --sparse"
            )
        if member.size > _MOST_MEMBER:
            name = escape(member.name)
            raise UsageError(f"{self.path}: its member {name} has {member.size:,} bytes, allowed are {_MOST_MEMBER:,}")

    def read(self, member: tarfile.TarInfo) -> bytes:
        """The content of a member: of a stream the current one, of a file any."""
        self.check_content(member)
        where = self.input.tell()
        self.input.limit = max(member.size, _MOST_HEADER)
        with self.naming_errors():
            self.input.seek(member.offset_data)
            content = self.input.read(member.size)
            if len(content) < member.size:
                raise tarfile.ReadError("unexpected end of data")
        self.input.limit = _MOST_HEADER
        if self.input.seekable():
            self.input.seek(where)
        return content

    def _check_end(self) -> None:
        """Raises UsageError without an end mark, which tarfile does not notice. What follows the mark is counted."""
        if self.input.last != tarfile.NUL * tarfile.BLOCKSIZE:
            raise UsageError(f"{self.path} is cut short or damaged: it lacks the end mark of a tar file; copy it again")
        with self.naming_errors():
            tail = self.input.read(_MOST_TAIL)
        if tail.strip(b"\0"):
            self.ledger.warnings.append(
                f"{self.path}: what follows the end mark of the tar file is not read; if several files were joined, give each"
            )

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """Turn the errors of tarfile and of decompression into a UsageError."""
        try:
            yield
        except UsageError:
            raise
        except RecursionError:
            raise self.unreadable("a long chain of headers") from None
        except Exception as error:  # of a forged header tarfile may raise anything
            raise self.unreadable(reason(error)) from None

    def unreadable(self, why: str) -> UsageError:
        """The error for a file that is not a tar file."""
        if self.input.size is None:
            return UsageError(f"{self.path} cannot be read as a stream of a tar file: {why}")
        return UsageError(f"{self.path} is not a readable tar file ({why}); copy it again")


def refuse_compressed(path: str, start: bytes) -> None:
    """Raises UsageError for a local shard that is compressed."""
    kind = find_compression(start)
    if kind is None:
        return
    command = {"gzip": "gzip -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "zstd": "zstd -dc"}.get(kind)
    if command is None:
        raise UsageError(f"{path} is a {kind} file; expected a tar file")
    raise UsageError(
        f"{path} is compressed with {kind}, and local shards are read by offset; decompress it ({command} {path} > SHARD.tar),"
        f" or train on it as a stream: --data 'pipe:{command} {path}'"
    )
