"""Training runs in separate processes. They start fast, because they are forked from a server that has imported everything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from dgnet.errors import UsageError
from dgnet.training import Interrupted, TrainConfig, read_run, train

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.helpers.processes"])


def hear_signals() -> None:
    """As a command that is typed: a job in the background ignores Ctrl+C, and one under nohup ignores SIGHUP."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_training(options: dict[str, Any], resume: bool, environment: dict[str, str], file_bytes: int | None) -> None:
    """One process of a run in options["output"]. Exits with the same status as `dgnet train`."""
    folder = Path(options["output"])
    os.setsid()  # a process group of its own, together with its loading processes
    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("RANK", 0))  # Lightning sets it when it is imported, which the server has done
    log = os.open(f"{folder}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    hear_signals()
    if file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    try:
        if resume:
            config, result = read_run(folder, {}, TrainConfig)
            if result is None:
                train(config, folder)
        else:
            train(TrainConfig(**options))
    except UsageError as error:
        print(error)
        sys.exit(2)
    except Interrupted as error:
        sys.exit(128 + error.signum)


class Run:
    """A run of `ranks` processes, with the environment variables of torchrun."""

    def __init__(self, options: dict[str, Any], ranks: int = 1) -> None:
        self.options, self.ranks = options, ranks
        self.folder = Path(options["output"])
        self.processes: list[Any] = []

    def start(self, file_bytes: int | None = None) -> Run:
        """Start the run, or resume the one in the folder. `file_bytes`: writing larger files fails, as on a full disk."""
        environments: list[dict[str, str]] = [{}]
        if self.ranks > 1:
            world = {"WORLD_SIZE": str(self.ranks), "LOCAL_WORLD_SIZE": str(self.ranks), "TORCHELASTIC_RUN_ID": "run"}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GROUP_RANK": "0"}
            environments = [world | place | {"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(self.ranks)]
        resume = (self.folder / "config.yaml").exists()
        self.processes = [
            FORK.Process(target=run_training, args=(self.options, resume, environment, file_bytes))
            for environment in environments
        ]
        for process in self.processes:
            process.start()
        return self

    def wait(self, seconds: float = 600) -> list[int | None]:
        """The exit statuses of the processes; None for one that is still running after `seconds`."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        return [process.exitcode for process in self.processes]

    def signal(self, signum: int, rank: int | None = None) -> None:
        """Send a signal to the process groups of all ranks, or of one, like launchers do."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)

    def log(self) -> str:
        """What the processes printed."""
        path = Path(f"{self.folder}.log")
        return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    """Wait until `condition()` is true. Raises TimeoutError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)


def free_port() -> int:
    """A free TCP port on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
