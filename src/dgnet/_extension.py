"""Build and load parts of dgnet that are written in C++: once on a machine, when they are first needed."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from dgnet.errors import UsageError, reason
from dgnet.paths import is_folder

_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


_SECONDS = 900.0  # a compiler that takes longer hangs; half a minute is usual
_MARK = b"\ndgnet sha256 "  # behind the library, where loaders do not look; then the checksum of what comes before


@dataclass(frozen=True)
class Extension:
    """A part of dgnet in C++. Its library is in TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions.

    A file that is not whole is built again. A library that was built before needs no compiler.
    """

    name: str  # the library's name begins with it
    what: str  # what it runs: "sparse mode"
    duration: str  # of a build
    sources: tuple[Path, ...]  # what is compiled, then its headers
    is_defined: Callable[[], bool]  # whether what the library defines is there

    def load(self) -> Path:
        """Load the library, and return its path. If this machine has not built it yet, build it first.

        Raises UsageError if there is no C++ compiler to build it, if it fails, and if the library cannot be stored or loaded.
        """
        library = self.find_library()
        if not is_whole(library):
            command = (*self._find_compiler(), *_list_flags(), *self._list_places())
            print(f"compiling the {self.what}, once on this machine: about {self.duration} ({library})", file=sys.stderr)
            if failure := _try_to_build(command, library, self.what):
                raise UsageError(failure)
        self._load_library(library)
        return library

    def load_built(self) -> Path | None:
        """Load the library if this machine has built it, and return its path; None if it has not. As `load`, it may raise."""
        library = self.find_library()
        if not is_whole(library):
            return None
        self._load_library(library)
        return library

    def find_library(self) -> Path:
        """Where the library is or will be. Its name depends on all that it is built from."""
        sources = [source.read_text(encoding="utf-8") for source in self.sources]
        key = hashlib.sha256("\0".join([torch.__version__, *_list_flags(), *sources]).encode()).hexdigest()[:16]
        return find_folder(self.what) / f"{self.name}-{key}.so"

    def _load_library(self, library: Path) -> None:
        try:
            torch.ops.load_library(library)
            if not self.is_defined():
                raise OSError("it does not define the extension")
        except OSError as error:  # such as: built against other system libraries, in a home that machines share
            raise UsageError(
                f"{library} cannot be loaded: {reason(error)}; remove the file, and it will be built again"
            ) from error

    def _find_compiler(self) -> list[str]:
        """The words that start the compiler."""
        try:
            named = shlex.split(os.environ.get("CXX", ""))
        except ValueError as error:
            raise UsageError(f"CXX={os.environ['CXX']!r} is not a command: {error}") from None
        compiler = named or [name for name in ("g++", "clang++") if shutil.which(name)][:1]
        if not compiler:
            raise UsageError(f"the compiled {self.what} needs a C++ compiler: install g++, or name one in CXX")
        return compiler

    def _list_places(self) -> list[str]:
        """Where the source and torch are. The library does not depend on it: another environment uses the same one."""
        torch_folder = Path(torch.__file__).parent
        places = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        return [str(self.sources[0]), *places]


def _list_flags() -> list[str]:
    """The compiler's options on which the library depends."""
    flags = ["-std=c++20", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-fopenmp"]
    flags += _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    return [*flags, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]


def find_folder(what: str) -> Path:
    """The folder of compiled extensions, absolute. `what`: which one is asked for.

    Raises UsageError if the user has no home folder and names no other.
    """
    try:
        return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser().absolute()
    except (OSError, RuntimeError) as error:  # no home folder; or the current folder is gone
        raise UsageError(f"the compiled {what} has no folder: {reason(error)}; name one in TORCH_EXTENSIONS_DIR") from None


def is_whole(library: Path) -> bool:
    """Whether `library` is there as `build` wrote it. Loading a part of one ends the process with SIGBUS."""
    try:
        content, mark, checksum = library.read_bytes().rpartition(_MARK)
    except OSError:
        return False
    return bool(mark) and hashlib.sha256(content).hexdigest().encode() == checksum


@cache
def _try_to_build(command: tuple[str, ...], library: Path, what: str) -> str:
    """The reason for which `library` cannot be built, empty if it is. Remembered, because a compiler may take long to fail."""
    try:
        build(list(command), library, what)
    except UsageError as error:
        return str(error)
    return ""


def build(command: list[str], library: Path, what: str) -> None:
    """Compile `library`, which is `what`. It is never there incomplete, because other processes may load it.

    Raises UsageError if the compiler fails, and if the library cannot be stored.
    """
    try:
        if is_folder(library):
            raise UsageError(f"the compiled {what} cannot be built: {library} is a folder; remove it")
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, ignore_cleanup_errors=True) as folder:
            built = Path(folder) / library.name
            _compile([*command, "-o", str(built)], Path(folder) / "messages.txt", what)
            checksum = hashlib.sha256(built.read_bytes()).hexdigest()
            with built.open("ab") as file:
                file.write(_MARK + checksum.encode())
                file.flush()
                os.fsync(file.fileno())
            built.replace(library)
    except OSError as error:
        where = error.filename or library.parent
        raise UsageError(
            f"the compiled {what} cannot be built: {reason(error)} ({where}); name another folder in TORCH_EXTENSIONS_DIR,"
            " or another compiler in CXX"
        ) from error


def _compile(command: list[str], messages: Path, what: str) -> None:
    """Run the compiler. Its messages go to a file: a compiler that hangs may leave processes behind, which keep a pipe open."""
    with messages.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            status = process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            raise UsageError(
                f"the compiled {what} cannot be built: {command[0]} has not ended after {_SECONDS:g} seconds;"
                " name another compiler in CXX"
            ) from None
        finally:
            process.kill()  # also after a signal; does nothing if it has ended
            process.wait()
    if status:
        lines = messages.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        message = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit status {status}")
        raise UsageError(f"the compiled {what} cannot be built: {message[:300]}")
