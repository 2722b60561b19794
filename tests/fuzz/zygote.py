"""A process that has imported dgnet and its libraries, and forks once for each command that it is asked to run.

A fork starts in a few milliseconds, and a command that crashes, hangs or leaves processes behind is seen and ended.
Run as `python -m tests.fuzz.zygote FD`: one JSON request per line on stdin, one JSON answer per line on the file descriptor FD.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY = 3 * 2**30
"""Bytes that a command may allocate beyond what the imports take."""
FILE_SIZE = 2**29


def serve(answers: int) -> None:
    """Answer the requests on stdin until it is closed."""
    import torch

    import dgnet.cli

    torch.set_num_threads(1)
    modules = {"dgnet.training", "dgnet.evaluation", "dgnet.detection", "dgnet.analysis", "dgnet.bench", "dgnet.inference"}
    for name in sorted(modules):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork copies fewer pages
    for line in sys.stdin.buffer:
        request = json.loads(line)
        for name in request.get("import", []):
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        pid = os.fork()
        if pid == 0:
            run(dgnet.cli.main, request)
        answer = json.dumps(wait(pid, request["limit"])).encode() + b"\n"
        os.write(answers, answer)


def run(main: Any, request: dict[str, Any]) -> None:
    """In the fork: run the command and exit."""
    box = Path(request["box"])
    os.setsid()
    os.chdir(box)
    os.environ.update(HOME=str(box), TMPDIR=str(box), COLUMNS="100", **request.get("environment", {}))
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(request["answer"] + "." + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, descriptor)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_SIZE, FILE_SIZE))
    status: object = 1
    if "epochs" in request:
        _interrupt_after(request["epochs"])
    try:
        status = main([word.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for word in request["words"]])
    except SystemExit as error:
        status = error.code
    except BaseException:
        traceback.print_exc()
    if request.get("modules"):
        Path(request["answer"] + ".modules").write_text(json.dumps(sorted(sys.modules)))
    atexit._run_exitfuncs()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(0 if status is None else status if isinstance(status, int) else 1)


def _interrupt_after(epochs: int) -> None:
    """End the training that follows by SIGTERM after a number of epochs."""
    from dgnet.training._module import RunModule

    start = RunModule.on_train_epoch_start

    def stop(module: RunModule) -> None:
        start(module)
        if module.current_epoch == epochs:
            os.kill(os.getpid(), signal.SIGTERM)

    RunModule.on_train_epoch_start = stop  # type: ignore[method-assign]


def wait(pid: int, limit: float) -> dict[str, Any]:
    """Wait for the fork, and end it and what it started after `limit` seconds."""
    start = time.monotonic()
    while True:
        found, code = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - start
        if found:
            break
        if seconds > limit:
            os.kill(pid, signal.SIGUSR2)  # writes where it hangs
            time.sleep(0.2)
            _kill_group(pid)
            os.waitpid(pid, 0)
            return {"status": None, "signal": None, "hangs": True, "left": False, "seconds": seconds}
        time.sleep(0.002 if seconds < 0.5 else 0.02)
    left = _is_alive(pid)
    for _ in range(20 if left else 0):  # a worker may need a moment to see that its parent has gone
        time.sleep(0.05)
        left = _is_alive(pid)
    _kill_group(pid)
    status = os.waitstatus_to_exitcode(code)
    return {"status": max(status, 0), "signal": -min(status, 0) or None, "hangs": False, "left": left, "seconds": seconds}


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
