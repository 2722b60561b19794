"""Run what a grid lacks; each run is an ordinary `dgnet train` followed by `dgnet evaluate`, in processes of their own."""

from __future__ import annotations

import contextvars
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dgnet._cost import cost
from dgnet.bench import describe_hardware, versions
from dgnet.checkpoint import load_checkpoint
from dgnet.documents import parse_json
from dgnet.errors import UsageError, shorten
from dgnet.experiments._check import check_images, check_runs
from dgnet.experiments._grid import Grid, GridRun
from dgnet.experiments._places import Places
from dgnet.experiments._queue import Queue
from dgnet.files import lock, make_writable, read_table, write_table
from dgnet.graph import find_stages
from dgnet.options import as_word, flag
from dgnet.paths import is_file, read_text
from dgnet.training import TrainConfig

JOBS_OF_A_GPU = 4


def run_grid(
    grid: Grid,
    runs: Sequence[GridRun],
    places: Places,
    *,
    jobs: int | None = None,
    minutes: float = math.inf,
    imports: str | None = None,
) -> int:
    """Run `runs` of a grid, each in its own processes, and add a row to its table for each; returns how many failed.

    `jobs`: runs at the same time, by default one per core, or four per GPU. `minutes`: start no new run after this time.
    `imports`: packages with code of the user's own, separated by commas, for --import and --trust-code.

    A run that was begun is continued. If an exception ends this function, such as KeyboardInterrupt, the runs are terminated:
    each writes a checkpoint. Raises UsageError for a mistake, before anything runs.
    """
    check_runs(grid, runs, places)
    check_images(grid, runs, places)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpus = list_gpus(os.environ, torch.cuda.device_count()) if device == "cuda" else []
    jobs = jobs or (JOBS_OF_A_GPU * len(gpus) if gpus else count_cores())
    make_writable(places.output)
    refusal = f"another dgnet experiment run is already running {grid.path}"
    with lock(grid.path, refusal), _Workers(grid, places, device, gpus, jobs, imports) as workers:
        return workers.run(runs, minutes)


def count_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def list_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for a process on each of the `count` GPUs that this process may use."""
    visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if len(visible) >= count else [str(number) for number in range(count)]


class _Workers:
    """Runs in parallel, each in its own process. Leaving the `with` block stops the ones still running."""

    def __init__(self, grid: Grid, places: Places, device: str, gpus: Sequence[str], jobs: int, imports: str | None) -> None:
        self.grid, self.places, self.device, self.jobs, self.imports = grid, places, device, jobs, imports
        self.lock = threading.Lock()
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.failed = 0
        self.threads = max(count_cores() // jobs, 1)
        self.slots: list[dict[str, str]] = []  # the environment of each job that has no run
        for job in range(jobs):
            gpu = {"CUDA_VISIBLE_DEVICES": gpus[job % len(gpus)]} if len(gpus) > 1 else {}
            self.slots.append({"OMP_NUM_THREADS": str(self.threads), **gpu})

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()

    def run(self, runs: Sequence[GridRun], minutes: float) -> int:
        """Run all, each after those that it begins with; returns how many failed."""
        begun = time.monotonic()
        queue = Queue(runs)
        running: dict[Future[dict[str, Any] | None], tuple[GridRun, dict[str, str]]] = {}
        with (
            tqdm(total=len(runs), desc=f"{self.jobs} at a time", unit="run", file=sys.stderr) as bar,
            ThreadPoolExecutor(self.jobs) as pool,
        ):
            try:
                while True:
                    while self.slots and time.monotonic() - begun <= 60 * minutes and (run := queue.take()):
                        if failed := queue.find_failed(run):
                            self._report(f"{run.arm}, seed {run.seed} begins with {failed.arm}, whose run failed")
                            queue.end(run, is_finished=False)
                            bar.set_postfix(failed=self.failed)
                            continue
                        slot = self.slots.pop(0)
                        # A thread has a context of its own: it would not know which code is trusted.
                        future = pool.submit(contextvars.copy_context().run, self._run_one, run, slot)
                        running[future] = run, slot
                    if not running:
                        return self.failed
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        run, slot = running.pop(future)
                        self.slots.append(slot)
                        row = future.result()
                        queue.end(run, is_finished=row is not None)
                        if row is None:
                            bar.set_postfix(failed=self.failed)
                            continue
                        bar.write(f"{run.arm}, seed {run.seed}: {self.grid.evaluated} top-1 {row['top1']} %", sys.stderr)
                        bar.update()
            except BaseException:
                self.__exit__()
                raise

    def _report(self, line: str) -> None:
        """Say why a run failed, and count it."""
        with self.lock:
            self.failed += 1
        tqdm.write(f"dgnet: {line}", sys.stderr)

    def _run_one(self, run: GridRun, slot: Mapping[str, str]) -> dict[str, Any] | None:
        """Train, evaluate, and add a row to the table; returns the row, or None if the run failed."""
        folder = self.places.folder(run)
        log = folder.with_name(f"{folder.name}.log")
        options = self.places.options(self.grid, run)
        if self.device == "cpu":
            options["threads"] = self.threads
        if self.imports:
            options["imports"] = self.imports
        started = time.monotonic()
        is_begun = is_file(folder / "config.yaml")
        if is_begun:
            places = ("data", "val_data", "data_root", "threads", "imports")
            options = {"resume": str(folder), **{name: options[name] for name in places if options.get(name) is not None}}
        if self._call(["train", *_as_words(options)], log, slot) is None:
            return None
        minutes = None if is_begun else round((time.monotonic() - started) / 60, 2)  # not known if the run was resumed
        checkpoint = load_checkpoint(folder)
        network = checkpoint.build_network()
        follows_images = any(stage.weighting.reads_features for stage in find_stages(network))
        evaluated = {"data": options.get("val_data"), "data_root": options.get("data_root"), "trust_code": self.imports}
        words = [f"--device={self.device}", "--json", *(["--adjacency-controls"] if follows_images else [])]
        # Their present paths: the run may have been trained on another machine.
        words += _as_words({name: value for name, value in evaluated.items() if value}) + _as_words(run.evaluation)
        found = self._call(["evaluate", str(folder), *words], log, slot)
        if found is None:
            return None
        counted = cost(network, checkpoint.preprocessing.image_size)
        evaluation = parse_json(found, f"the output of dgnet evaluate {folder}")
        row: dict[str, Any] = {"group": run.group, "arm": run.arm, "seed": run.seed, "digest": run.digest}
        row |= {
            "epochs": run.options.get("epochs", TrainConfig.epochs),
            "parameters": counted.params,
            "multiply_adds": counted.multiply_adds,
        }
        row |= {name: round(evaluation.pop(name), 4) for name in ("top1", "top5", "loss")}
        curves = read_curve(folder)
        row |= {name: round(float(curves[-1][name]), 4) for name in ("train_top1", "train_loss")}
        figures = {name: value for name, value in evaluation.items() if not isinstance(value, dict)}
        row |= {name: round(value, 6) if isinstance(value, float) else value for name, value in figures.items()}
        row |= {"minutes": minutes, "jobs": self.jobs, "hardware": describe_hardware(self.device)}
        row |= {"versions": " ".join(f"{name} {version}" for name, version in versions(self.device).items())}
        labels = {"arm": run.arm, "seed": run.seed, "digest": run.digest}
        with self.lock:
            for path, rows in ((self.grid.curves, [labels | curve for curve in curves]), (self.grid.table, [row])):
                others = [old for old in read_table(path) if (old["arm"], old["digest"]) != (run.arm, run.digest)]
                write_table(path, [*others, *rows])
        return row

    def _call(self, words: Sequence[str], log: Path, slot: Mapping[str, str]) -> str | None:
        """Run a `dgnet` command; returns its stdout, or None if it failed or was stopped."""
        with log.open("a", encoding="utf-8") as errors:
            with self.lock:
                if self.stopped:
                    return None
                command = [sys.executable, "-m", "dgnet", *words]
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **slot}
                )
                self.processes.add(process)
            out, _ = process.communicate()
            with self.lock:
                self.processes.discard(process)
        if process.returncode:
            if not self.stopped:
                self._report(f"dgnet {words[0]} exited with status {process.returncode}: {_last_line(log)}; see {log}")
            return None
        return out


def _as_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of the command line, each with its value, which may begin with a dash."""
    return [f"{flag(name)}={as_word(value)}" for name, value in options.items()]


def _last_line(log: Path) -> str:
    """The last line of a log: of a mistake, the one that says it."""
    try:
        lines = read_text(log).splitlines()
    except UsageError:
        return "the log cannot be read"
    return shorten(lines[-1].removeprefix("dgnet: ")) if lines else "it said nothing"


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """One row for each epoch of a run: its number (from 1), losses and accuracies, empty if it was not evaluated."""
    rows = read_table(folder / "metrics.csv")
    names = ("train_loss", "train_top1", "val_loss", "val_top1")
    return [{"epoch": int(row["epoch"]) + 1, **{name: row.get(name, "") for name in names}} for row in rows]
