"""DG-Net against static network for the paper's seven networks: time and memory of training steps and inference, as ratios.

    python benchmarks/networks.py --tasks train --dtypes bfloat16 --forms compiled
    python benchmarks/networks.py --tasks train --dtypes bfloat16 --forms compiled --stem      # what DG's stem costs a ResNet
    python benchmarks/networks.py --table          # print the Markdown tables of the measured rows

Each row is one `dgnet bench` in its own process, and is written to a JSON file as soon as it is measured. Rows that are already
in the file are skipped, so an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dgnet
from common import MODELS, measure_missing, missing_rows, read_rows, stage_shapes
from dgnet.inference import time_alternating
from dgnet.options import flag

STRIDED = "strided_"
"""Prefix of the static ResNets with DG-Net's stem: no max-pool, and its stride moved to the first stage."""
TARGETS: dict[str, dict[str, float]] = {
    "compiled": {"mobilenetv2_100": 1.10, "resnext50_32x4d": 1.10, "resnet101": 1.12, "others": 1.06},
    "eager": {"mobilenetv2_100": 1.12, "resnext50_32x4d": 1.12, "resnet101": 1.18, "others": 1.08},
    "infer": {"mobilenetv2_100": 1.12, "others": 1.08},
}
"""The largest ratios aimed at, for training steps of both forms, and for inference."""


def main() -> None:
    """Measure what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--tasks", nargs="+", default=["train", "infer"], choices=["train", "infer"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled", "cuda-graphs"])
    parser.add_argument("--train-batch-size", type=int, default=32)
    parser.add_argument("--infer-batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--allocators", nargs="+", default=["keep"], choices=["keep", "system"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "networks_cpu.json")
    parser.add_argument("--stem", action="store_true", help="measure static ResNets with DG's stem instead of DG-Nets")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new row after this many minutes")
    parser.add_argument(
        "--compile-ahead",
        type=int,
        default=0,
        help="first compile all missing rows into the compiler's cache, this many in parallel",
    )
    parser.add_argument("--table", action="store_true", help="print Markdown tables of the file, measure nothing")
    args = parser.parse_args()
    if args.table:
        print(format_tables(read_rows(args.output)))
        return
    begun, wanted = time.monotonic(), list_rows(args)
    if args.compile_ahead:
        with ThreadPoolExecutor(args.compile_ahead) as pool:
            for row in missing_rows(wanted, read_rows(args.output)):
                pool.submit(run_bench, row, 1, args.device, errors=subprocess.DEVNULL)  # a failure shows again below
        print(f"compiled ahead in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)

    def measure(**row: Any) -> dict[str, Any] | None:
        what = " ".join(f"{name}={value}" for name, value in row.items())
        done = run_bench(row, args.rounds, args.device)
        if done.returncode:
            tqdm.write(f"{what}: failed with status {done.returncode}", sys.stderr)
            return None
        result: dict[str, Any] = json.loads(done.stdout)
        tqdm.write(f"{what}: ratio {result['ratio']:.3f}", sys.stderr)
        return result | {"floor_seconds": floor_seconds(result, args.device)}

    measure_missing(wanted, args.output, args.minutes - (time.monotonic() - begun) / 60, measure)


def run_bench(row: dict[str, Any], rounds: int, device: str, errors: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run `dgnet bench` for a row in its own process; `errors`: where stderr goes, by default this process's stderr."""
    options = [f"{flag(name)}={value}" for name, value in row.items() if name != "model"]
    options += [f"--rounds={rounds}", f"--device={device}", "--json"]
    command = [sys.executable, "-m", "dgnet", "bench", row["model"], *options]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)


def list_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The requested rows, each as options of `dgnet bench`."""
    rows = []
    for task in args.tasks:
        for dtype in args.dtypes:
            for form in args.forms:
                for batch_size in [args.train_batch_size] if task == "train" else args.infer_batch_sizes:
                    for allocator in args.allocators:
                        row = {"task": task, "batch_size": batch_size, "dtype": dtype, "compile": form != "eager"}
                        row |= {"cuda_graphs": form == "cuda-graphs", "allocator": allocator, "image_size": args.image_size}
                        names = [name for name in args.models if "resne" in name] if args.stem else args.models
                        rows += [
                            {"model": f"{STRIDED if args.stem else 'dg_'}{name}", "against": name, **row} for name in names
                        ]
    return rows


def floor_seconds(result: dict[str, Any], device: str) -> dict[str, float]:
    """Lower bounds of DG-Net's additional time: bytes over copy bandwidth, multiply-adds over the static network's rate.

    Returns `memory` and `arithmetic` in seconds, and `bandwidth` in bytes per second.

    Bytes forward: each edge reads its map, while the static network reads one shortcut per block. Bytes backward: each edge
    reads the gradient of its receiving node; each node reads its own map and writes its gradient. A map that only DG-Net's
    convolutions write is written once and read once in each direction.
    """
    model, against = dgnet.create_model(result["model"]), dgnet.create_model(result["against"])
    ours, theirs = (dgnet.cost(network, result["image_size"]) for network in (model, against))
    shapes = [] if result["model"].startswith(STRIDED) else stage_shapes(model, result["image_size"])
    blocks = sum((nodes - 2) * channels * height * width for nodes, channels, height, width in shapes)
    edges = ours.aggregation_multiply_adds
    passes = 4 if result["task"] == "train" else 2
    elements = edges - blocks + (ours.activations - theirs.activations) * passes
    if result["task"] == "train":
        elements += edges + 2 * blocks
    size = 4 if result["dtype"] == "float32" else 2
    bandwidth = copy_bandwidth(device)
    memory = elements * size * result["batch_size"] / bandwidth
    arithmetic = result["against_seconds"] * max(ours.multiply_adds / theirs.multiply_adds - 1, 0)
    return {"memory": memory, "arithmetic": arithmetic, "bandwidth": bandwidth}


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy of 256 MiB; the best of ten."""
    source = torch.empty(64 * 2**20, device=device).normal_()
    target = torch.empty_like(source)
    seconds = time_alternating({"copy": lambda: target.copy_(source)}, rounds=10, device=device, round_seconds=0)
    return 2 * source.nbytes / min(seconds["copy"])


def find_target(result: dict[str, Any]) -> float:
    """The ratio aimed at for a row."""
    targets = TARGETS["infer" if result["task"] == "infer" else "compiled" if result["compile"] else "eager"]
    return targets.get(result["against"], targets["others"])


def format_tables(results: list[dict[str, Any]]) -> str:
    """One Markdown table for each task, batch size, dtype and form.

    The columns "less structure" subtract the cost of the paper's own structure. For ResNets it is the effect of DG's stem on
    the static network (rows measured with --stem); for others it is the share of additional multiply-adds (MobileNetV2's
    projections, routers).
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    stems: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        form = "CUDA graphs" if result["cuda_graphs"] else "compiled" if result["compile"] else "eager"
        title = f"{result['task']}, batch {result['batch_size']}, {result['dtype']}, {form}"
        if result["allocator"] != "keep":
            title += f", allocator {result['allocator']}"
        if result["model"].startswith(STRIDED):
            stems[title, result["against"]] = result
        else:
            groups.setdefault(title, []).append(result)
    lines = []
    for title, rows in groups.items():
        lines += [f"### {title}", ""]
        lines += [
            "| network | static ms | DG ms | ratio | quartiles | target | (DG − static) / floor | ratio less structure"
            " | memory of tensors | of the process | less structure | static MiB |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in sorted(rows, key=lambda row: MODELS.index(row["against"])):
            target = find_target(r)
            floor = r["floor_seconds"]["memory"] + r["floor_seconds"]["arithmetic"]
            low, high = r["ratio_quartiles"]
            tensors, memory = (
                "–" if r.get(key) is None else f"{r[key]:.3f}" for key in ("peak_tensors_ratio", "peak_memory_ratio")
            )
            static = "–" if r["against_side"]["peak_memory"] is None else f"{r['against_side']['peak_memory'] / 2**20:,.0f}"
            over_floor = (r["ratio"] - 1) * r["against_seconds"] / floor
            cells = [
                r["against"],
                f"{1000 * r['against_seconds']:.1f}",
                f"{1000 * r['model_seconds']:.1f}",
                f"{r['ratio']:.3f}",
            ]
            stem = stems.get((title, r["against"]))
            structure = stem["ratio"] - 1 if stem else r["floor_seconds"]["arithmetic"] / r["against_seconds"]
            kept = stem["peak_memory_ratio"] - 1 if stem and stem["peak_memory_ratio"] else 0
            bare = "–" if r["peak_memory_ratio"] is None else f"{r['peak_memory_ratio'] - kept:.3f}"
            known = stem or "resne" not in r["against"]
            cells += [f"{low:.3f} … {high:.3f}", f"{target:.2f}", f"{over_floor:.1f}"]
            cells += [f"{r['ratio'] - structure:.3f}" if known else "–", tensors, memory, bare if known else "–", static]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
