"""Run the missing runs of a grid; each is an ordinary `dgnet train` followed by `dgnet evaluate`.

    python experiments/run.py experiments/cifar10.yaml --data FOLDER --output RUNS

It can be interrupted and started again, also on another machine. A run is finished when it is in results/GRID.csv.
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
from dgnet.data import expand_shards
from dgnet.errors import UsageError, check_range
from dgnet.files import lock, make_writable, read_table, write_table
from dgnet.graph import find_stages
from dgnet.options import flag
from grid import RUN_OF, Grid, Run, missing_runs, read_grid


def main() -> int:
    """Parse the options and run; returns the exit status. As with `dgnet`, a mistake gives one line and status 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="YAML file")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the grid's data")
    parser.add_argument("--weights", type=Path, help="folder that holds the grid's weights; by default that of --data")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for run folders and logs")
    parser.add_argument("--groups", nargs="+", help="run only these groups")
    parser.add_argument("--jobs", type=int, help="runs in parallel; by default one per core, or four on a GPU")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new run after this many minutes")
    parser.add_argument("--dry-run", action="store_true", help="list the missing runs and run nothing")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # exit normally, so that the runs are stopped
    try:
        return run_grid(args)
    except UsageError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; start it again to continue", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, the reader has gone: what is still buffered is lost
        return 141


def run_grid(args: argparse.Namespace) -> int:
    """Run the missing runs; returns 1 if one failed, otherwise 0."""
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
    refusal = f"another run.py is already running {args.grid}"
    with lock(args.grid, refusal), Workers(grid, args.data, args.weights or args.data, args.output, device) as workers:
        return workers.run(missing, jobs, args.minutes)


class Workers:
    """Runs in parallel, each in its own process. Leaving the `with` block stops the ones still running."""

    def __init__(self, grid: Grid, data: Path, weights: Path, output: Path, device: str) -> None:
        self.grid, self.data, self.weights, self.output, self.device = grid, data, weights, output, device
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
        """Run all; returns 1 if one failed, otherwise 0."""
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
                with folder_lock:  # arms that differ only in their evaluation share a training
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
        """Train, evaluate, and add a row to the table; returns the row, or None if the run failed."""
        folder = self.output / run.name
        log = self.output / f"{run.name}.log"
        options = {**run.options, "output": str(folder), "data": str(self.data / self.grid.data)}
        options["val_data"] = None if self.grid.test is None else str(self.data / self.grid.test)
        if options.get("weights") and not options["weights"].startswith(RUN_OF):
            options["weights"] = str(self.weights / options["weights"])
        for arm in run.needs:
            needed = self.grid.find(arm, run.seed).name
            with self.lock:
                needed_lock = self.folders[needed]
            with needed_lock:  # it comes first in the grid: until it is finished, its thread holds the lock
                options = {
                    name: str(self.output / needed) if value == f"{RUN_OF}{arm}" else value for name, value in options.items()
                }
        if self.device == "cpu":
            options["threads"] = self.threads
        started = time.monotonic()
        is_begun = (folder / "config.yaml").exists()
        if is_begun:
            places = ("data", "val_data", "threads")
            options = {"resume": str(folder), **{name: options[name] for name in places if options.get(name) is not None}}
        if self.call(["train", *as_words(options)], log) is None:
            return None
        minutes = None if is_begun else round((time.monotonic() - started) / 60, 2)  # not known if the run was resumed
        checkpoint = load_checkpoint(folder)
        network = checkpoint.build_network()
        follows_images = any(stage.weighting.reads_features for stage in find_stages(network))
        controls = ["--adjacency-controls"] if follows_images else []
        words = [f"--device={self.device}", "--json", *controls, *as_words(run.evaluation)]
        if options.get("val_data"):  # its present path: the run may have been trained on another machine
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
        """Run a `dgnet` command; returns its stdout, or None if it failed or was stopped."""
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
                tqdm.write(f"run.py: dgnet {words[0]} exited with status {process.returncode}; see {log}", sys.stderr)
            return None
        return out


def as_words(options: dict[str, Any]) -> list[str]:
    """Options as command-line arguments."""
    return [f"{flag(name)}={value if isinstance(value, str) else json.dumps(value)}" for name, value in options.items()]


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """One row for each epoch of a run: its number (from 1), losses and accuracies, empty if it was not evaluated."""
    rows = read_table(folder / "metrics.csv")
    names = ("train_loss", "train_top1", "val_loss", "val_top1")
    return [{"epoch": int(row["epoch"]) + 1, **{name: row.get(name, "") for name in names}} for row in rows]


if __name__ == "__main__":
    sys.exit(main())
