"""What surrounds a command: its exit status, its answer to signals, and one line for each error that is not a bug.

It imports nothing that takes time, so that an interrupt is answered from the start.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, NoReturn

from dgnet._streams import Stream, describe_failure, discard_rest, open_missing, safe_streams, say

_WORDS = {"SIGINT": "interrupted", "SIGTERM": "terminated", "SIGHUP": "the terminal was closed"}


class Ended(KeyboardInterrupt):
    """A signal ends the command. Libraries that clean up after Ctrl-C do so after any other signal too.

    `signum`: SIGINT, or SIGTERM for all others.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum


def status_after(signum: int) -> int:
    """The exit status after a signal. A hangup counts as SIGTERM."""
    return 128 + (signum if signum == signal.SIGINT else signal.SIGTERM)


def answer(work: Callable[[], int]) -> int:
    """Run `work`; returns its exit status: after an error that is not a bug, that of the error, after a line on stderr.

    SystemExit and the exceptions of a bug are raised.
    """
    with safe_streams() as output:
        try:
            try:
                status = work()
            except SystemExit:
                output.check()
                raise
            output.check()
            return status
        except Exception as error:
            judged, line = _judge(error, output)
            if judged is None:
                raise
            if line:
                say(f"dgnet: {line}")
            return judged
        except KeyboardInterrupt:
            signum = _signals.received or signal.SIGINT
            _signals.report()
            return status_after(signum)


def _judge(error: Exception, output: Stream) -> tuple[int | None, str]:
    """The exit status for an exception, None for a bug; and the line to print."""
    from dgnet.errors import UsageError, describe_failure_of_machine

    if _signals.received:  # a library has replaced the exception of the signal
        _signals.report()
        return status_after(_signals.received), ""
    if isinstance(error, UsageError):
        return 2, str(error)
    if output.failure is not None and isinstance(error, OSError | ValueError):
        output.is_answered = True
        if isinstance(output.failure, BrokenPipeError):
            return 128 + getattr(signal, "SIGPIPE", 13), ""
        return 1, f"the output cannot be written: {describe_failure(output.failure)}"
    line = describe_failure_of_machine(error)
    return (None, "") if line is None else (1, line)


class _Signals:
    """The answer of the process to SIGINT, SIGTERM and SIGHUP, until a run replaces it."""

    def __init__(self) -> None:
        self.received = 0
        self.process = 0
        self.is_reported = False

    def install(self) -> None:
        """Answer the signals from now on, except those that the process was started to ignore (nohup, a job of a script)."""
        self.process = os.getpid()
        for name in _WORDS:
            signum = getattr(signal, name, None)  # Windows has no SIGHUP
            if signum is not None and signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(signum, self.handle)
        sys.unraisablehook = self._note_swallowed
        threading.excepthook = _leave_out_repeated

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """End at once while modules are imported, after a second signal, and in a process forked for a part of the work."""
        if os.getpid() != self.process:
            os._exit(status_after(signum))
        is_second = bool(self.received)
        self.received = self.received or signum
        if is_second or _is_loading(frame):
            # No exception: C code that is being imported may abort, and a library may take it for a missing package.
            self.report(is_direct=True)
            os._exit(status_after(self.received))
        raise Ended(status_after(signum) - 128)

    def report(self, is_direct: bool = False) -> None:
        """Print the line about the signal once, in one process of a run. `is_direct`: past Python's streams."""
        if self.is_reported or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        self.is_reported = bool(self.process)
        line = f"dgnet: {_WORDS[signal.Signals(self.received or signal.SIGINT).name]}"
        if not is_direct:
            say(line)
            return
        with suppress(OSError):
            os.write(2, f"{line}\n".encode())

    def _note_swallowed(self, unraisable: Any) -> None:
        """An exception in a callback, which Python prints and forgets. A signal must not be forgotten: it is sent again."""
        if not isinstance(unraisable.exc_value, Ended):
            sys.__unraisablehook__(unraisable)
            return
        signum, self.received = self.received, 0
        repeat = threading.Timer(0.05, _send, [signum])
        repeat.daemon = True
        repeat.start()


_signals = _Signals()


def _is_loading(frame: FrameType | None) -> bool:
    """Whether the command still imports what it needs: nothing is half done then, and nothing is to be cleaned up."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    for outer in reversed(frames):
        if "importlib._bootstrap" in outer.f_code.co_filename:
            return True
        module = outer.f_globals.get("__name__", "")
        if module.startswith("dgnet.") and not module.startswith(("dgnet.cli", "dgnet._")):
            return False  # a part of the library is at work; what it imports in between does not count
    return False


def _send(signum: int) -> None:
    """Send a signal to the main thread, which may be waiting for something. Windows can only raise it here."""
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, signum)
    else:
        signal.raise_signal(signum)


def _leave_out_repeated(failed: threading.ExceptHookArgs) -> None:
    """Do not print an exception of TensorBoard's thread: TensorBoard raises it again where something is logged."""
    if not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


def report_end(line: str) -> None:
    """Print a command's own line about the signal that ended it, instead of the general one."""
    _signals.is_reported = bool(_signals.process)
    say(line)


def run_process(work: Callable[[], int]) -> NoReturn:
    """Run `work`, the whole process, and exit with its status."""
    _signals.install()
    open_missing()
    streams = sys.stdout, sys.stderr
    status: int = 1
    try:
        status = answer(work)
    except SystemExit as end:
        status = _read_status(end)
    except BaseException:
        import traceback

        with safe_streams():
            traceback.print_exc()
    if _signals.received:  # a library may have taken the exception for an end
        with safe_streams():
            _signals.report()
        status = status_after(_signals.received)
    for signum in (signal.SIGINT, signal.SIGTERM):  # while Python ends, a signal must not print a traceback
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, lambda *_: os._exit(status))
    discard_rest(*streams)
    sys.exit(status)


def _read_status(end: SystemExit) -> int:
    """The status with which Python would exit. It prints a message on stderr."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    with safe_streams():
        say(str(end.code))
    return 1
