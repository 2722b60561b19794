"""The sparse mode against the dense mode, with imposed connectivity: measured speed-up as a share of the ideal one.

    python benchmarks/sparse_mode.py                 # every network, share and batch size; continues where it stopped
    python benchmarks/sparse_mode.py --table         # print the Markdown table of the measured rows

Each block is drawn alive for each sample with the probability `share`; every edge between two nodes that are alive is open. The
ideal speed-up is the network's dense multiply-adds divided by those executed. In both modes normalisations are folded and
memory is channels_last; the modes are measured in alternating rounds. On the CPU the sparse mode runs with the compiled
extension and the dense mode eagerly; both call the same convolutions.
"""

from __future__ import annotations

import argparse
import statistics
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dgnet
from common import measure_missing, ratios, read_rows
from dgnet._cost import cost_model
from dgnet.bench import describe_hardware, versions
from dgnet.graph import find_stages, record_connectivity, use_connectivity
from dgnet.inference import fold_batch_norms, set_mode, time_alternating
from dgnet.inference._native import use_native
from dgnet.inference._sparse import MODES

TARGETS = {1: 0.9, 8: 0.85, 64: 0.85}
"""Smallest share of the ideal aimed at on a CPU, by batch size. With every node alive, sparse may be at most 3 % slower."""


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["dg_resnet50", "dg_resnet101"])
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.8, 0.6, 0.4])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new row after this many minutes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sparse_cpu.json")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the file, measure nothing")
    args = parser.parse_args()
    results = read_rows(args.output)
    if not args.table:
        dgnet.keep_freed_memory()
        wanted = [
            {"model": model, "batch_size": batch, "share": share, "image_size": args.image_size, "device": args.device}
            for batch in args.batches
            for model in args.models
            for share in args.shares
        ]
        results = measure_missing(wanted, args.output, args.minutes, partial(measure, rounds=args.rounds))
    print(format_table(results))


@torch.inference_mode()
def measure(model: str, batch_size: int, share: float, image_size: int, device: str, rounds: int) -> dict[str, Any]:
    """Measure one row: both modes in alternating rounds over several drawn connectivities."""
    torch.manual_seed(0)
    network = fold_batch_norms(dgnet.create_model(model), 64).to(device, memory_format=torch.channels_last)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
    drawn = [draw_connectivity(network, batch_size, share, device) for _ in range(max(16 // batch_size, 1))]
    costs = cost_model(network, image_size)
    executed = []
    for adjacency in drawn:
        with use_connectivity(network, adjacency), record_connectivity(set_mode(network, "sparse")) as record:
            network(images)
        executed.append(float(costs.executed(record.ran, [matrix != 0 for matrix in record.adjacency]).mean()))

    sides = {"dense": network, "sparse": deepcopy(network)}
    set_mode(network, "dense")
    set_sparse = use_native if device == "cpu" else partial(set_mode, mode="sparse")
    set_sparse(sides["sparse"])

    def step(mode: str) -> None:
        for adjacency in drawn:
            with use_connectivity(sides[mode], adjacency):
                sides[mode](images)

    rounds_of = time_alternating({mode: partial(step, mode) for mode in MODES}, rounds, device)
    seconds = {mode: [value / len(drawn) for value in values] for mode, values in rounds_of.items()}
    ideal = costs.dense / statistics.fmean(executed)
    speedup, least, greatest = ratios(seconds["dense"], seconds["sparse"])
    return {
        "ideal": ideal,
        "speedup": speedup,
        "speedup_range": [least, greatest],
        "of_ideal": speedup / ideal,
        "dense_seconds": statistics.median(seconds["dense"]),
        "sparse_seconds": statistics.median(seconds["sparse"]),
        "rounds": rounds,
        "hardware": describe_hardware(device),
        "versions": versions(device),
    }


def draw_connectivity(network: nn.Module, batch: int, share: float, device: str) -> list[Tensor]:
    """A random adjacency for each stage, (B, N, N): blocks are drawn alive, edges between nodes that are alive are open."""
    matrices = []
    for stage in find_stages(network):
        alive = torch.rand(batch, stage.topology.num_nodes, device=device) < share
        alive[:, [0, -1]] = True
        both = alive[:, :, None] & alive[:, None] & stage.topology.mask.to(device)
        matrices.append(both * torch.empty_like(both, dtype=torch.float32).uniform_(0.5, 0.8))
    return matrices


def format_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one line for each row."""
    lines = ["| network | batch | alive | dense ms | sparse ms | speed-up | range | ideal | share of ideal | target |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["model"], row["batch_size"], -row["share"])):
        low, high = row["speedup_range"]
        target = "1 / 1.03" if row["share"] == 1 else TARGETS.get(row["batch_size"], "–")
        dense, sparse = 1000 * row["dense_seconds"], 1000 * row["sparse_seconds"]
        lines.append(
            f"| {row['model']} | {row['batch_size']} | {row['share']} | {dense:.1f} | {sparse:.1f} | {row['speedup']:.3f} |"
            f" {low:.3f} … {high:.3f} | {row['ideal']:.3f} | {row['of_ideal']:.3f} | {target} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
