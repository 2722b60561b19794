"""Which of a grid's runs may start: each after those that it begins with, and one at a time in a run folder."""

from __future__ import annotations

from collections.abc import Sequence

from dgnet.experiments._grid import GridRun


class Queue:
    """Runs that wait for a job, in the order in which they start if nothing holds them up."""

    def __init__(self, runs: Sequence[GridRun]) -> None:
        self._waiting = list(runs)
        self._running: list[GridRun] = []
        self._names = {run.name for run in runs}  # what else a run begins with was finished before
        self._finished: set[str] = set()

    def take(self) -> GridRun | None:
        """Start the first run that may start; None if all others wait for running ones."""
        for run in self._waiting:
            # Arms that differ only in their evaluation share a training, which one of them writes at a time.
            is_busy = any(run.name == other.name for other in self._running)
            if not is_busy and not any(self._is_ahead(needed) for needed in run.begins.values()):
                self._waiting.remove(run)
                self._running.append(run)
                return run
        return None

    def find_failed(self, run: GridRun) -> GridRun | None:
        """A run that `run` begins with and that failed."""
        return next((one for one in run.begins.values() if one.name in self._names - self._finished), None)

    def end(self, run: GridRun, is_finished: bool) -> None:
        """A run that was taken has ended. If not `is_finished`, it failed."""
        self._running.remove(run)
        if is_finished:
            self._finished.add(run.name)

    def _is_ahead(self, needed: GridRun) -> bool:
        return any(needed.name == other.name for other in (*self._waiting, *self._running))
