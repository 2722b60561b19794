"""Gates decided at each block, once per stage or once per network: sparse against dense and static, as deployed.

    python benchmarks/early_gates.py --device cuda        # continues where it stopped
    python benchmarks/early_gates.py --table              # print the Markdown table of the measured rows

The networks have weights of 1 and block gates; each gate is open for a share of the images. Static and dense networks are
folded and compiled, on a GPU under CUDA graphs. The sparse mode is the recommended one; on a GPU it runs uncompiled, and for
single images also as one graph with a branch for each block ("branches"). All are measured in alternating rounds. The ideal is
the static network's time times the share of the dense multiply-adds that is executed.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dgnet
from common import measure_missing, ratios, read_rows
from dgnet._cost import cost_model
from dgnet.bench import describe_hardware, versions
from dgnet.graph import NodeGates, find_stages, record_connectivity
from dgnet.inference import compile_network, deploy, fold_batch_norms, time_alternating

READS = ("senders", "stage", "network")


def main() -> None:
    """Measure what is missing, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.6])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 1, 256, 8])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new row after this many minutes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "early_gates_cpu.json")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the file, measure nothing")
    args = parser.parse_args()
    results = read_rows(args.output)
    if not args.table:
        dgnet.keep_freed_memory()
        common = {"image_size": args.image_size, "dtype": args.dtype, "device": args.device}
        wanted = [
            {"model": model, "batch_size": batch, "share": share, **common}
            for batch in args.batches
            for model in args.models
            for share in args.shares
        ]
        results = measure_missing(wanted, args.output, args.minutes, partial(measure, rounds=args.rounds))
    print(format_table(results))


@torch.no_grad()
def measure(model: str, batch_size: int, share: float, image_size: int, dtype: str, device: str, rounds: int) -> dict[str, Any]:
    """Measure one row: static, dense, and sparse with each kind of gate."""
    torch.manual_seed(0)
    kind, size = getattr(torch, dtype), (image_size, image_size)
    images = torch.randn(batch_size, 3, *size, device=device, dtype=kind) + torch.randn(
        batch_size, 3, 1, 1, device=device, dtype=kind
    )
    images = images.contiguous(memory_format=torch.channels_last)
    static = dgnet.create_model(f"strided_{model}").to(device, kind).eval()
    calls = {"static": deploy(static, size, "dense", batch_size, compile=True)}
    executed: dict[str, float] = {}
    for reads in READS:
        options = {"gate_policy": "convolutional"} if reads == "network" else {}
        network = dgnet.create_model(
            f"dg_{model}", weighting="fixed", node_gate="hard", node_gate_std=1.0, gate_reads=reads, **options
        )
        network = network.to(device, kind).eval()
        open_share(network, images, share)
        costs = cost_model(network, size)
        with record_connectivity(network) as record:
            network(images)
        executed[reads] = float(costs.executed_in(record).mean()) / costs.dense
        if reads == "senders":
            calls["dense"] = deploy(network, size, "dense", batch_size, compile=True)
        calls[f"sparse, {reads}"] = deploy(network, size, "sparse", batch_size, compile=device == "cpu")
        if device != "cpu" and batch_size == 1:
            calls[f"branches, {reads}"] = compile_network(fold_batch_norms(network, size), "sparse")
    seconds = time_alternating({name: partial(call, images) for name, call in calls.items()}, rounds, device)
    return {
        "executed": executed,
        "milliseconds": {name: 1000 * statistics.median(values) for name, values in seconds.items()},
        "speedup": {name: ratios(seconds["static"], values) for name, values in seconds.items()},  # median, least, greatest
        "rounds": rounds,
        "hardware": describe_hardware(device),
        "versions": versions(device),
    }


def open_share(network: nn.Module, images: Tensor, share: float) -> None:
    """Set the bias of each gate so that it is open for a share of `images`; a single image is let through at random."""

    def decide(gates: NodeGates, node: int, votes: Tensor, offset: float = 0.0) -> Tensor:
        logits = votes.sum(1)
        edge = torch.quantile(logits.float(), 1 - share) if len(logits) > 1 else logits[0] + (torch.rand(()) - share).to(logits)
        gates.bias[node] = -edge.to(gates.bias.dtype)
        return NodeGates.decide(gates, node, votes, offset)

    gates = [stage.node_gates for stage in find_stages(network)]
    for own in gates:
        own.decide = partial(decide, own)  # type: ignore[method-assign]
    network(images)
    for own in gates:
        del own.decide


def format_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with one line for each row and form."""
    lines = ["| network | batch | alive | form | ms | speed-up over static | range | executed | share of ideal |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: (row["model"], row["batch_size"], -row["share"])):
        for form, milliseconds in row["milliseconds"].items():
            speedup, least, greatest = row["speedup"][form]
            executed = row["executed"].get(form.partition(", ")[2], 1.0)
            lines.append(
                f"| {row['model']} | {row['batch_size']} | {row['share']} | {form} | {milliseconds:.2f} | {speedup:.3f} |"
                f" {least:.3f} … {greatest:.3f} | {executed:.2f} | {speedup * executed:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
