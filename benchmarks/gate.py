"""A few ratios of speed and memory, compared with the bounds in baseline.json: `make bench-check`. Under two minutes.

    python benchmarks/gate.py                           # exit status 1 if a ratio is beyond its bound
    python benchmarks/gate.py --only sparse_batch8      # some of them
    python benchmarks/gate.py --record                  # also store the measured ratios beside the bounds

Each ratio compares two forms in alternating rounds of one run, so it depends little on the machine. The bounds leave a margin:
a ratio beyond its bound is a loss that a user notices. Run it on a CPU that does nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dgnet
from dgnet.documents import read_json
from dgnet.errors import UsageError, check_choice, check_range
from dgnet.files import replace_file, writing

BASELINE = Path(__file__).parent / "baseline.json"
ROUNDS = 5

WHAT = {
    "aggregate_compiled": "aggregation, forward and backward, compiled: rate as a share of a copy's",
    "aggregate_eager": "aggregation, forward and backward, eager: rate as a share of a copy's",
    "train_step": "training step of dg_resnet18, eager: time over that of resnet18",
    "train_memory": "training step of dg_resnet18, eager: peak memory over that of resnet18",
    "sparse_batch1": "dg_resnet50, 60 % of blocks alive, batch 1: speed-up of the sparse mode as a share of the ideal",
    "sparse_batch8": "the same at batch 8",
}
"""The ratios, by name."""


def main(words: Sequence[str] | None = None, measures: Mapping[str, Callable[[], dict[str, float]]] | None = None) -> int:
    """Measure, print the table, and return the exit status. `measures`: by default MEASURES."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(WHAT), metavar="NAME", help="ratios to measure")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="file of bounds")
    parser.add_argument("--record", action="store_true", help="store the measured ratios in the file")
    args = parser.parse_args(words)
    try:
        for name in args.only:
            check_choice("--only", name, WHAT)
        baseline = read_baseline(args.baseline)
        dgnet.keep_freed_memory()
        values = measure(args.only, MEASURES if measures is None else measures)
        results = [judge(name, values[name], baseline["ratios"][name]) for name in args.only]
        print(format_results(results))
        if args.record:
            record(args.baseline, baseline, values)
    except UsageError as error:
        print(f"gate.py: {error}", file=sys.stderr)
        return 2
    beyond = [result.name for result in results if not result.is_within]
    print(f"beyond the bound: {', '.join(beyond)}" if beyond else "all ratios are within their bounds")
    return 1 if beyond else 0


@dataclass(frozen=True)
class Result:
    """A measured ratio and its bound, `least` or `most`. `recorded`: the ratio that the file of bounds holds."""

    name: str
    value: float
    least: float | None
    most: float | None
    recorded: float | None

    @property
    def is_within(self) -> bool:
        """Whether the ratio keeps its bound. A NaN does not."""
        if self.least is not None:
            return self.value >= self.least
        return self.most is not None and self.value <= self.most


def judge(name: str, value: float, entry: Mapping[str, Any]) -> Result:
    """Compare a ratio with its entry of the file."""
    return Result(name, value, entry.get("least"), entry.get("most"), entry.get("measured"))


def read_baseline(path: Path) -> dict[str, Any]:
    """The file of bounds. Raises UsageError unless it has one bound for each ratio, and no others."""
    baseline = read_json(path, str(path))
    entries = baseline.get("ratios") if isinstance(baseline, dict) else None
    if not isinstance(entries, dict) or set(entries) != set(WHAT):
        raise UsageError(f"{path} must hold `ratios` with one entry for each of: {', '.join(WHAT)}")
    for name, entry in entries.items():
        bounds = {key: value for key, value in entry.items() if key in ("least", "most")} if isinstance(entry, dict) else {}
        if len(bounds) != 1 or set(entry) - {"least", "most", "measured"}:
            raise UsageError(f"{path}: {name} must have `least` or `most`, and may have `measured`; got {entry!r}")
        for key, value in entry.items():
            if key != "measured" or value is not None:
                check_range(f"{path}: {name}: {key}", value, 0)
    return dict(baseline)


def measure(names: Sequence[str], measures: Mapping[str, Callable[[], dict[str, float]]]) -> dict[str, float]:
    """The ratios called `names`. One measurement may give several."""
    values: dict[str, float] = {}
    for name in names:
        if name not in values:
            print(f"measuring {name}: {WHAT[name]}", file=sys.stderr, flush=True)
            values |= measures[name]()
    return values


def format_results(results: Sequence[Result]) -> str:
    """A Markdown table with one line for each ratio."""
    lines = ["| ratio | measured | bound | recorded | |", "|---|---|---|---|---|"]
    for result in results:
        bound = f"at least {result.least:g}" if result.least is not None else f"at most {result.most:g}"
        recorded = "–" if result.recorded is None else f"{result.recorded:.3f}"
        verdict = "within" if result.is_within else "BEYOND"
        lines.append(f"| {result.name} | {result.value:.3f} | {bound} | {recorded} | {verdict} |")
    return "\n".join(lines)


def record(path: Path, baseline: dict[str, Any], values: Mapping[str, float]) -> None:
    """Store the measured ratios with the machine and the date. Bounds stay as they are."""
    from dgnet.bench import describe_hardware, versions

    for name, value in values.items():
        baseline["ratios"][name]["measured"] = round(value, 3)
    baseline |= {"date": datetime.date.today().isoformat(), "hardware": describe_hardware("cpu"), "versions": versions("cpu")}
    with writing(path), replace_file(path) as written:
        written.write_text(json.dumps(baseline, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measure_aggregation() -> dict[str, float]:
    """The output node of ResNet-18's second stage, with an edge from every other node, in float32."""
    import aggregate

    options = Namespace(device="cpu", map_mib=48.0, rounds=ROUNDS, forms=("eager", "compiled"))
    found = aggregate.measure(channels=128, height=28, width=28, edges=3, dtype="float32", args=options)
    return {f"aggregate_{form}": found["share_of_copy"][f"{form} both"] for form in ("compiled", "eager")}


def measure_training() -> dict[str, float]:
    """A step with 16 images of 112 pixels, in float32."""
    from dgnet.bench import BenchConfig, bench

    config = BenchConfig("dg_resnet18", task="train", batch_size=16, image_size=112, rounds=ROUNDS)
    found = bench(config, show_progress=False)
    if found.peak_memory_ratio is None:
        raise UsageError("this system does not tell the peak memory of a process; use --only without train_memory")
    return {"train_step": found.ratio, "train_memory": found.peak_memory_ratio}


def measure_sparse(batch_size: int) -> dict[str, float]:
    """The compiled sparse mode, at 224 pixels, with connectivity that is drawn at random."""
    import sparse_mode

    found = sparse_mode.measure("dg_resnet50", batch_size, share=0.6, image_size=224, device="cpu", rounds=ROUNDS)
    return {f"sparse_batch{batch_size}": found["of_ideal"]}


MEASURES: dict[str, Callable[[], dict[str, float]]] = {
    "aggregate_compiled": measure_aggregation,
    "aggregate_eager": measure_aggregation,
    "train_step": measure_training,
    "train_memory": measure_training,
    "sparse_batch1": lambda: measure_sparse(1),
    "sparse_batch8": lambda: measure_sparse(8),
}
"""What measures each ratio."""


if __name__ == "__main__":
    sys.exit(main())
