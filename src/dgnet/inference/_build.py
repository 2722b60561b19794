"""Build and load the C++ extension of the sparse mode, `native.cpp`."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from dgnet.errors import UsageError

SOURCE = Path(__file__).with_name("native.cpp")

_VECTOR_FLAGS = {
    "AVX2": ["-mavx2", "-mfma"],
    "AVX512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


@cache
def load_native() -> None:
    """Load the extension, which defines `torch.classes.dgnet`. If this machine has not built it yet, build it first.

    It is stored in TORCH_EXTENSIONS_DIR, by default ~/.cache/torch_extensions.

    Raises UsageError if there is no C++ compiler, or the compiler fails.
    """
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise UsageError(f"CXX={os.environ['CXX']!r} is not a command: {error}") from None
    compiler = named or [name for name in ("g++", "clang++") if shutil.which(name)][:1]
    if not compiler:
        raise UsageError("the compiled sparse mode needs a C++ compiler: install g++, or name one in CXX")
    command = [*compiler, "-std=c++20", "-O3", "-shared", "-fPIC", "-fopenmp"]
    command += _VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", str(SOURCE)]
    installed = Path(torch.__file__).parent
    command += [f"-I{installed / 'include'}", f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256("\0".join([torch.__version__, *command, SOURCE.read_text(encoding="utf-8")]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    library = folder / f"dgnet-{key}.so"
    if not library.exists():
        print(f"compiling the sparse mode, once on this machine: about half a minute ({library})", file=sys.stderr)
        _build(command, library)
    try:
        torch.ops.load_library(library)
    except OSError as error:  # such as: built against other system libraries, in a home folder that machines share
        raise UsageError(f"{library} cannot be loaded: {error}; remove the file, and it will be built again") from error


def _build(command: list[str], library: Path) -> None:
    """Compile `library`. It is never there incomplete, because other processes may load it."""
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, text=True)
            built.replace(library)
    except OSError as error:
        raise UsageError(f"the compiled sparse mode cannot be built: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines()
        message = next((line for line in lines if "error" in line), lines[-1] if lines else f"exit status {error.returncode}")
        raise UsageError(f"the compiled sparse mode cannot be built: {message}") from error
