"""Networks trained to a budget against their static baseline: images/s and latency on real images, measured in one run.

    python benchmarks/budget.py STATIC_RUN DG_RUN NAME=BUDGET_RUN… --data 'CIFAR10/cifar10-test-000000.tar'
    python benchmarks/budget.py --table         # print the Markdown table of the measured rows

All networks are compiled, as they would be deployed: STATIC_RUN and DG_RUN as one graph, the budget runs in the sparse mode
(docs/inference.md). Normalisations are folded in all. The first images of the data are used in batches, one batch per call in
turn, so that wirings vary as in real use. A run is listed under NAME, or under its model and budget.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import dgnet
from common import ratios, read_rows, write_rows
from dgnet.bench import describe_hardware, versions
from dgnet.checkpoint import Checkpoint, load_checkpoint
from dgnet.evaluation import open_evaluation_data
from dgnet.inference import time_alternating, time_step
from dgnet.inference._speed import deploy

IMAGES = 256
"""Number of images used."""


def main() -> None:
    """Measure every batch size and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folders, the static baseline first")
    parser.add_argument("--data", help="images to run on")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "budget_cpu.json")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the file, measure nothing")
    args = parser.parse_args()
    results = read_rows(args.output)
    if not args.table:
        if not args.runs or args.data is None:
            parser.exit(2, "budget.py needs RUN folders and --data; name both, or print the measured rows with --table\n")
        dgnet.keep_freed_memory()
        checkpoints = dict(load_named(run) for run in args.runs)
        dataset = open_evaluation_data(next(iter(checkpoints.values())), args.data, None)
        images = torch.stack([dataset[index][0] for index in range(IMAGES)])
        for batch in tqdm(args.batches, desc="batch sizes", file=sys.stderr):
            results = [row for row in results if row["batch_size"] != batch]
            results += measure(checkpoints, images, batch, args.rounds)
            write_rows(args.output, results)
    print(format_table(results))


def load_named(run: str) -> tuple[str, Checkpoint]:
    """The name and the checkpoint of `run`, "NAME=FOLDER" or "FOLDER"."""
    name, has_name, folder = run.rpartition("=")
    checkpoint = load_checkpoint(folder)
    budget = checkpoint.config.get("budget")
    return (name if has_name else checkpoint.model + ("" if budget is None else f", budget {budget}")), checkpoint


def measure(checkpoints: dict[str, Checkpoint], images: Tensor, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each network: median and range of images/s, and of the ratio to the first network in the same round.

    And the 50th and 95th percentile of the time of single calls, in milliseconds, over one pass over the images.
    """
    steps: dict[str, Callable[[], object]] = {}
    for name, checkpoint in checkpoints.items():
        mode = "dense" if checkpoint.config.get("budget") is None else "sparse"
        call = deploy(checkpoint.build_network(), checkpoint.preprocessing.image_size, mode, batch_size, compile=True)
        turn = itertools.cycle(batch.contiguous(memory_format=torch.channels_last) for batch in images.split(batch_size))
        steps[name] = lambda call=call, turn=turn: call(next(turn))
    seconds = time_alternating(steps, rounds)
    calls = {name: [] for name in steps}
    for _ in range(len(images) // batch_size):
        for name, step in steps.items():
            calls[name].append(1000 * time_step(step))
    first = next(iter(seconds.values()))
    rows = []
    for name, times in seconds.items():
        ratio, least, greatest = ratios(first, times)
        row = {"model": name, "batch_size": batch_size, "images_per_second": batch_size / statistics.median(times)}
        row |= {"latency_ms": [float(value) for value in np.percentile(calls[name], (50, 95))]}
        row |= {"range": [batch_size / max(times), batch_size / min(times)], "ratio": ratio, "ratio_range": [least, greatest]}
        rows.append(row | {"rounds": rounds, "hardware": describe_hardware("cpu"), "versions": versions("cpu")})
    return rows


def format_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one line for each network and batch size."""
    titles = ("network", "batch", "images/s", "range", "times static", "range", "p50 ms", "p95 ms")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in sorted(rows, key=lambda row: row["batch_size"]):
        low, high = row["range"]
        least, most = row["ratio_range"]
        lines.append(
            f"| {row['model']} | {row['batch_size']} | {row['images_per_second']:,.0f} | {low:,.0f} … {high:,.0f} |"
            f" {row['ratio']:.2f} | {least:.2f} … {most:.2f} |"
            + "".join(f" {value:.1f} |" for value in row.get("latency_ms", ()))  # older rows have none
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
