"""Run what a grid still lacks; each run is an ordinary `dgnet train` and `dgnet evaluate`.

    python experiments/run.py experiments/cifar10.yaml --data FOLDER --output RUNS

Interrupt it when you like and start it again, on another machine too: a run is done when it stands in results/GRID.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dgnet
from dgnet.bench import describe_hardware, versions
from dgnet.checkpoint import load_checkpoint
from dgnet.cli import leave_pipe
from dgnet.data import expand_shards
from dgnet.errors import UsageError, check_range
from dgnet.files import lock, make_writable, read_table, write_table
from dgnet.graph import find_stages
from dgnet.options import flag
from grid import Grid, Run, missing_runs, read_grid


def main() -> int:
    """Parse and run; a mistake is one line and status 2, as with `dgnet`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the grid's data")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for run folders and logs")
    parser.add_argument("--groups", nargs="+", help="these groups only")
    parser.add_argument("--jobs", type=int, help="runs at a time; by default one a core, on a GPU four")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run after so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="list what is missing and run nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # so that what it started is stopped too
    try:
        return run_grid(args)
    except UsageError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; start it again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return leave_pipe()


def run_grid(args: argparse.Namespace) -> int:
    """Run what is missing; returns 1 where a run failed."""
    grid = read_grid(args.grid)
    groups = list(dict.fromkeys(run.group for run in grid.runs))
    for group in args.groups or []:
        if group not in groups:
            raise UsageError(f"unknown group {group!r}; groups of {args.grid}: {', '.join(groups)}")
    missing = [run for run in missing_runs(grid) if args.groups is None or run.group in args.groups]
    if args.dry_run:
        for run in missing:
            print(f"{run.group}: {run.arm}, seed {run.seed}")
        return 0
    for shards in filter(None, (grid.data, grid.test)):
        expand_shards(str(args.data / shards))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = args.jobs or (4 if device == "cuda" else len(os.sched_getaffinity(0)))
    check_range("--jobs", jobs, 1)
    make_writable(args.output)
    refusal = f"another run.py works on {args.grid}; it runs what is missing"
    with lock(args.grid, refusal), Workers(grid, args.data, args.output, device) as workers:
        return workers.run(missing, jobs, args.minutes)


class Workers:
    """Runs side by side, each a process of its own; leaving stops those that are under way."""

    def __init__(self, grid: Grid, data: Path, output: Path, device: str) -> None:
        self.grid, self.data, self.output, self.device = grid, data, output, device
        self.lock = threading.Lock()
        self.folders: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.processes: set[subprocess.Popen[str]] = set()
        self.stopped = False
        self.failed = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()

    def run(self, runs: list[Run], jobs: int, minutes: float) -> int:
        """Run all; returns 1 where one failed."""
        begun = time.monotonic()
        self.jobs = jobs
        self.threads = max(len(os.sched_getaffinity(0)) // jobs, 1)
        with (
            tqdm(total=len(runs), desc=f"{jobs} at a time", unit="run", file=sys.stderr) as bar,
            ThreadPoolExecutor(jobs) as pool,
        ):

            def work(run: Run) -> None:
                if self.stopped or time.monotonic() - begun > 60 * minutes:
                    return
                with self.lock:
                    folder_lock = self.folders[run.name]
                with folder_lock:  # arms that differ in their evaluation share a training
                    row = self.run_one(run)
                if row is None:
                    bar.set_postfix(failed=self.failed)
                    return
                bar.write(f"{run.arm}, seed {run.seed}: {self.grid.evaluated} top-1 {row['top1']} %", sys.stderr)
                bar.update()

            try:
                for future in [pool.submit(work, run) for run in runs]:
                    future.result()
            except BaseException:
                self.__exit__()
                raise
        return int(self.failed > 0)

    def run_one(self, run: Run) -> dict[str, Any] | None:
        """Train, evaluate on the test images, add to the table. None where it failed."""
        folder = self.output / run.name
        log = self.output / f"{run.name}.log"
        options = {**run.options, "output": str(folder), "data": str(self.data / self.grid.data)}
        options["val_data"] = None if self.grid.test is None else str(self.data / self.grid.test)
        if self.device == "cpu":
            options["threads"] = self.threads
        started = time.monotonic()
        is_begun = (folder / "config.yaml").exists()
        if is_begun:
            places = ("data", "val_data", "threads")
            options = {"resume": str(folder), **{name: options[name] for name in places if options.get(name) is not None}}
        if self.call(["train", *as_words(options)], log) is None:
            return None
        minutes = None if is_begun else round((time.monotonic() - started) / 60, 2)  # unknown where it went on
        checkpoint = load_checkpoint(folder)
        network = checkpoint.build_network()
        follows_images = any(stage.weighting.reads_features for stage in find_stages(network))
        controls = ["--adjacency-controls"] if follows_images else []
        words = [f"--device={self.device}", "--json", *controls, *as_words(run.evaluation)]
        if options.get("val_data"):  # where it lies now: a run that is done may have been trained elsewhere
            words.append(f"--data={options['val_data']}")
        found = self.call(["evaluate", str(folder), *words], log)
        if found is None:
            return None
        cost = dgnet.cost(network, checkpoint.preprocessing.image_size)
        evaluation = json.loads(found)
        row: dict[str, Any] = {"group": run.group, "arm": run.arm, "seed": run.seed, "digest": run.digest}
        row |= {"epochs": run.options["epochs"], "parameters": cost.params, "multiply_adds": cost.multiply_adds}
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
                write_table(path, [*read_table(path), *rows])
        return row

    def call(self, words: list[str], log: Path) -> str | None:
        """stdout of a `dgnet` command; None where it failed or was stopped."""
        with log.open("a", encoding="utf-8") as errors:
            with self.lock:
                if self.stopped:
                    return None
                environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
                command = [sys.executable, "-m", "dgnet", *words]
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
                self.processes.add(process)
            out, _ = process.communicate()
            with self.lock:
                self.processes.discard(process)
        if process.returncode:
            if not self.stopped:
                self.failed += 1
                tqdm.write(f"run.py: dgnet {words[0]} left with status {process.returncode}; see {log}", sys.stderr)
            return None
        return out


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as words of a command line."""
    return [f"{flag(name)}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """One row for each epoch of a run: its number from 1, and losses and accuracies, empty where it was not evaluated."""
    rows = read_table(folder / "metrics.csv")
    names = ("train_loss", "train_top1", "val_loss", "val_top1")
    return [{"epoch": int(row["epoch"]) + 1, **{name: row.get(name, "") for name in names}} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
