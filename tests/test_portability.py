"""Systems other than Linux: what they lack is looked up and never assumed, and the commands do without it."""

from __future__ import annotations

import ast
import ctypes
import importlib
import multiprocessing
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import dgnet
from dgnet.bench._machine import describe_hardware
from dgnet.bench._memory import measure_peak, measure_tensors
from dgnet.cli import main
from dgnet.files import lock, replace_file
from dgnet.memory import keep_freed_memory
from tests.helpers.command import QUICK
from tests.helpers.data import write_folder
from tests.helpers.processes import FORK

SOURCE = Path(dgnet.__file__).parent

PORTABLE = {
    "os": {
        *(
            "name",
            "path",
            "environ",
            "devnull",
            "getpid",
            "open",
            "close",
            "write",
            "dup2",
            "fsync",
            "chmod",
            "replace",
            "listdir",
        ),
        *("O_RDONLY", "O_WRONLY", "O_APPEND", "O_CREAT", "_exit", "fspath", "fsdecode", "fsencode", "strerror", "stat", "sep"),
        *("get_terminal_size", "scandir", "walk", "access", "R_OK", "X_OK", "W_OK", "getcwd", "fstat", "PathLike", "isatty"),
        *("unlink", "remove", "rename", "DirEntry", "cpu_count", "O_RDWR"),
    },
    "signal": {
        "signal",
        "getsignal",
        "SIGTERM",
        "SIGINT",
        "SIG_DFL",
        "SIG_IGN",
        "Signals",
        "default_int_handler",
        "raise_signal",
    },
    "socket": {"socket", "getaddrinfo", "gethostname", "SOCK_STREAM", "SOL_SOCKET", "SO_REUSEADDR"},
}
"""Names of these modules that every system has. Other names are looked up, at the places that `LOOKED_UP` lists."""

LOOKED_UP = {
    "signal.sigwaitinfo": {"data/_loading.py"},  # not on macOS and Windows
    "signal.pthread_sigmask": {"data/_loading.py"},  # not on Windows, like all that follow
    "signal.SIG_BLOCK": {"data/_loading.py"},
    "os.setpgid": {"data/_loading.py"},
    "signal.SIGHUP": {"data/_loading.py"},
    "signal.SIGPIPE": {"data/_open_stream.py"},
    "signal.pthread_kill": {"_guard.py"},
    "fcntl": {"files.py"},
    "os.sched_getaffinity": {"experiments/_runner.py"},  # not on macOS and Windows
    "resource": {"data/_loading.py"},
}

POSIX = {"os.killpg": {"data/_open_stream.py"}, "signal.SIGKILL": {"data/_open_stream.py"}}
"""Names that are used after a look at `os.name`. Python itself needs them on Linux, so that they cannot be removed here."""

MISSING = {
    "macOS": ["signal.sigwaitinfo", "C"],
    "Windows": [*LOOKED_UP, "C", "folders"],
}
"""What `take_away` removes to imitate a system, as far as dgnet uses it."""


def take_away(patch, names):
    """Remove names of Linux from this process, and what has no name: open folders, and C functions of the process."""
    for name in names:
        module, _, attribute = name.partition(".")
        if name == "folders":
            patch.setattr(os, "open", partial(open_file, os.open))
        elif name == "C":
            patch.setattr(ctypes, "CDLL", partial(load_library, ctypes.CDLL))
        elif attribute:
            patch.delattr(importlib.import_module(module), attribute)
        else:
            patch.setitem(sys.modules, module, None)


def open_file(plain, path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return plain(path, *arguments, **options)


def load_library(plain, name, *arguments, **options):
    if name is None:
        raise TypeError("a name is needed")
    return plain(name, *arguments, **options)


def run_without(names, arguments, log, start="fork"):
    """One process: `dgnet` with these arguments, without the names; it prints to `log`. Forked workers lack them too."""
    multiprocessing.set_start_method(start, force=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    take_away(pytest.MonkeyPatch(), names)
    sys.exit(main([str(argument) for argument in arguments]))


def finish(process, log, seconds=600):
    """Wait for a process, which must succeed."""
    process.start()
    process.join(seconds)
    status = process.exitcode
    process.kill()
    assert status == 0, (status, log.read_text() if log.exists() else "")


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        write_folder(tmp_path / "data" / split, {"cat": count, "dog": count})
    return tmp_path / "data"


@pytest.mark.slow
@pytest.mark.parametrize("system", MISSING)
def test_training_and_evaluation_with_workers_do_without(system, folder, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    for arguments in (
        ["train", *QUICK, "--data", folder, "--epochs", 2, "--workers", 1, "--output", run],
        ["evaluate", run, "--workers", 1, "--batch-size", 4],
        ["train", "--resume", run],
    ):
        finish(FORK.Process(target=run_without, args=(MISSING[system], arguments, log)), log)
    assert "Traceback" not in log.read_text()


def spawn_workers(arguments, log):
    """One process: `dgnet` with these arguments. It starts workers as macOS and Windows do: what they use is pickled."""
    run_without([], arguments, log, "spawn")


@pytest.mark.slow
def test_what_workers_use_can_be_sent_to_them(folder, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    for arguments in (
        ["train", *QUICK, "--data", folder, "--epochs", 1, "--workers", 1, "--on-bad-image", "skip", "--output", run],
        ["evaluate", run, "--workers", 1, "--batch-size", 4],
    ):
        finish(FORK.Process(target=spawn_workers, args=(arguments, log)), log, 240)


def test_files_are_replaced_where_a_folder_cannot_be_opened(tmp_path, monkeypatch):
    take_away(monkeypatch, ["folders"])
    with replace_file(tmp_path / "a.txt") as written:
        written.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_not_locked_where_there_are_no_locks(tmp_path, monkeypatch):
    take_away(monkeypatch, ["fcntl", "folders"])
    with lock(tmp_path, "it is locked"), lock(tmp_path, "it is locked"):
        pass


@pytest.mark.parametrize("error", [TypeError, OSError, AttributeError])
def test_without_glibc_there_is_no_setting_of_memory_and_no_peak(error, monkeypatch):
    def load(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert keep_freed_memory() is False
    assert measure_peak(lambda: None, torch.device("cpu"), [], 0) is None


def test_without_a_profiler_the_memory_of_tensors_is_not_known(monkeypatch):
    monkeypatch.setattr("dgnet.compat.torch.kineto_available", lambda: False)
    assert measure_tensors(lambda: None, torch.device("cpu"), [], 5) is None


def test_without_proc_there_is_no_peak_and_less_is_known_of_the_processor(monkeypatch):
    plain = Path.open

    def open_path(self, *arguments, **options):
        if str(self).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_path)
    monkeypatch.setattr("dgnet.bench._memory.Path.write_text", lambda self, *a, **k: open_path(self))
    monkeypatch.setattr("dgnet.bench._machine.is_file", lambda path: False)
    assert measure_peak(lambda: None, torch.device("cpu"), [], 0) is None
    assert describe_hardware("cpu").endswith("threads")


def run_in(folder, arguments, log):
    """One process: the command, in a folder that is then removed."""
    os.chdir(folder)
    folder.rmdir()
    run_without([], arguments, log)


@pytest.mark.slow
def test_a_current_folder_that_was_removed(tmp_path):
    (tmp_path / "gone").mkdir()
    process = FORK.Process(target=run_in, args=(tmp_path / "gone", ["models"], tmp_path / "log"))
    process.start()
    process.join(300)
    assert process.exitcode == 2
    line = "dgnet: the current folder cannot be used: No such file or directory; change to another with cd\n"
    assert (tmp_path / "log").read_text() == line


def test_the_command_draws_without_a_window(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "no such backend")
    monkeypatch.setattr("dgnet.cli.main", lambda: int(os.environ["MPLBACKEND"] != "agg"))
    assert importlib.import_module("dgnet.__main__")._run() == 0


def find_uses():
    """(file, "module.name") for each name of the modules in PORTABLE, and (file, module) for each import, in the package."""
    for path in SOURCE.rglob("*.py"):
        file = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in PORTABLE:
                yield file, f"{node.value.id}.{node.attr}"
            elif isinstance(node, ast.Import):
                yield from ((file, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield file, node.module
                yield from ((file, f"{node.module}.{alias.name}") for alias in node.names if node.module in PORTABLE)


UNIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline", "curses", "crypt"}


def test_every_name_that_a_system_may_lack_is_looked_up():
    wrong = []
    for file, name in find_uses():
        module, _, attribute = name.partition(".")
        is_portable = attribute in PORTABLE[module] or not attribute if module in PORTABLE else module not in UNIX_MODULES
        if not is_portable and file not in (LOOKED_UP | POSIX).get(name, ()):
            wrong.append(
                f"{file} uses {name}: look it up (hasattr, or except ImportError), add it to LOOKED_UP, and test without"
            )
    assert wrong == []


def test_text_is_read_and_written_in_a_named_encoding():
    """The default differs by system and locale."""
    wrong = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = getattr(getattr(node.func, "value", None), "id", "")
            is_method = isinstance(node.func, ast.Attribute) and owner not in ("os", "tarfile", "Image")
            is_builtin = isinstance(node.func, ast.Name) and name == "open"
            if not is_builtin and not (is_method and name in ("open", "read_text", "write_text")):
                continue
            texts = [part.value for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Constant)]
            is_binary = any(isinstance(text, str) and "b" in text for text in texts)
            if not is_binary and "encoding" not in {keyword.arg for keyword in node.keywords}:
                wrong.append(f"{path.relative_to(SOURCE)}:{node.lineno}")
    assert wrong == []


def test_paths_of_one_system_are_read_by_the_benchmark_only():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                is_of_linux = node.value.startswith(("/proc", "/dev/", "/tmp", "/etc/", "/sys/"))
                is_listed = path.parent.name == "bench" or path.name == "paths.py"  # the latter only compares with them
                assert not is_of_linux or is_listed, f"{path.name}:{node.lineno} reads {node.value}"
