"""Shards behind URLs and pipes: which command reads them, and how long to wait for it."""

from __future__ import annotations

import io
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

from dgnet.data._tars import find_compression
from dgnet.errors import UsageError, check_choice, reason

PATIENCE = 120.0
"""Seconds to wait for the next bytes of a stream."""

FIRST_PATIENCE = 10.0
"""Seconds to wait for the first bytes of a URL before a run starts."""

_CURL = ("http", "https", "ftp", "ftps", "sftp", "scp")
# Statuses of commands that only say that nobody reads on: SIGPIPE, as seen by a shell, and curl's "failed writing".
_CLOSED = (-signal.SIGPIPE if hasattr(signal, "SIGPIPE") else 0, 141, 23)


def local_path(source: str) -> str:
    """The path that a `file:` URL names; other sources unchanged."""
    return url2pathname(urlparse(source).path) if source.startswith("file:") else source


def open_stream(url: str, patience: float | None = None) -> io.RawIOBase:
    """Open a URL, `pipe:COMMAND` or local path for reading from front to back.

    Raises UsageError if its command is not installed or there is none, and while reading, if the command fails or if nothing
    comes for `patience` seconds.
    """
    from webdataset.gopen import gopen, gopen_schemes, rewrite_url

    patience = PATIENCE if patience is None else patience
    url = rewrite_url(url)
    scheme = url.partition(":")[0].lower()
    if scheme == "pipe":
        return _Output(url, url.removeprefix("pipe:"), patience)
    if "://" not in url or scheme == "file":
        return open(local_path(url), "rb", buffering=0)
    header = ""
    if scheme == "hf":
        target, header = _hub_url(url)
        command = _curl(target)
    elif scheme in _CURL:
        command = _curl(url)
    elif scheme == "gs":
        command = ["gcloud", "storage", "cat", url] if shutil.which("gsutil") is None else ["gsutil", "cat", url]
        if shutil.which(command[0]) is None:
            command = ["gsutil", "cat", url]  # the name to report
    elif scheme == "s3":
        command = ["aws", "s3", "cp", "--only-show-errors", url, "-"]
    elif scheme == "ais":
        command = ["ais", "get", url, "-"]
    elif scheme in gopen_schemes:
        opened: io.RawIOBase = gopen(url)
        return opened
    else:
        check_choice("scheme of a stream", scheme, (*_CURL, "gs", "hf", "s3", "ais", "file", "pipe"))
    if shutil.which(command[0]) is None:
        raise UsageError(f"{url} is read by the command {command[0]}, which is not installed; install it, or use pipe:COMMAND")
    return _Output(url, command, patience, header)


def _curl(url: str) -> list[str]:
    retry = ["--connect-timeout", "10", "--retry", "30", "--retry-delay", "2"]
    return ["curl", *retry, "--fail", "--silent", "--show-error", "--location", "--config", "-", "--", url]


def _hub_url(url: str) -> tuple[str, str]:
    """The address of `hf://[datasets/|spaces/]USER/NAME[@REVISION]/PATH`, and curl's option with the user's token, if any."""
    from huggingface_hub import get_token, hf_hub_url

    first, *others = url.removeprefix("hf://").split("/")
    kind = {"datasets": "dataset", "spaces": "space"}.get(first)
    parts = others if kind else [first, *others]
    if len(parts) < 3 or not all(parts):
        raise UsageError(f"{url} must be like hf://datasets/USER/NAME/PATH.tar")
    user, name, *path = parts
    name, _, revision = name.partition("@")
    address: str = hf_hub_url(f"{user}/{name}", "/".join(path), repo_type=kind, revision=unquote(revision) or None)
    token = get_token()
    return address, f'header = "Authorization: Bearer {token}"\n' if token else ""


class _Output(io.RawIOBase):
    """The output of a command. Raises OSError if the command fails or is silent for too long. Closing it ends the command."""

    def __init__(self, url: str, command: str | Sequence[str], patience: float, config: str = "") -> None:
        self.url, self.patience = url, patience
        self.errors: IO[bytes] | None = None if isinstance(command, str) else tempfile.TemporaryFile()  # noqa: SIM115
        with tempfile.TemporaryFile() as given:
            given.write(config.encode())
            given.seek(0)
            options: dict[str, Any] = {} if self.errors is None else {"stdin": given, "stderr": self.errors}
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, shell=isinstance(command, str), bufsize=0, start_new_session=True, **options
            )
        assert self.process.stdout is not None
        self.output = self.process.stdout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read the next bytes; see the class."""
        if os.name == "posix" and not select.select([self.output], [], [], self.patience)[0]:
            self._kill()
            raise OSError(f"nothing came for {self.patience:.0f} seconds{self._said()}")
        content = self.output.read(len(buffer)) or b""
        buffer[: len(content)] = content
        if not content and self.process.wait() not in (0, *_CLOSED):
            raise OSError(f"the command ended with status {self.process.returncode}{self._said()}")
        return len(content)

    def _said(self) -> str:
        """The last line that the command wrote to stderr."""
        if self.errors is None:
            return ""
        self.errors.seek(0)
        lines = self.errors.read(10**6).decode(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f" ({said[:200]})" if said else ""

    def _kill(self) -> None:
        with suppress(OSError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)  # a shell and what it started
            else:
                self.process.kill()

    def close(self) -> None:
        """End the command."""
        if self.closed:
            return
        self.output.close()
        end = time.monotonic() + 0.2  # a command that has finished, or that notices that nobody reads, ends by itself
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        self._kill()
        self.process.wait()
        if self.errors is not None:
            self.errors.close()
        super().close()


def check_stream(url: str) -> None:
    """Raises UsageError if the first bytes of a URL do not come within some seconds or are text. A pipe is not tried."""
    if url.startswith("pipe:"):
        return
    try:
        with open_stream(url, FIRST_PATIENCE) as stream:
            start = b""
            while len(start) < 512 and (part := stream.read(512 - len(start))):
                start += part
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{url} cannot be read: {reason(error)}; check the address and the network") from None
    if find_compression(start) is None and start[257:262] != b"ustar" and b"\0" not in start:
        raise UsageError(f"{url} is not a tar file; it begins with {start[:40]!r}")
