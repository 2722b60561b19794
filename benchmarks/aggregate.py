"""Aggregation, forward and backward, as a share of the bandwidth of a copy of the same bytes in the same run.

    python benchmarks/aggregate.py                 # every stage shape of every network, maps beyond the cache
    python benchmarks/aggregate.py --shapes 64x56x56x3 1024x14x14x7 --forms eager plain --output FILE    # a few of them
    python benchmarks/aggregate.py --table         # print the Markdown table of the measured shapes

Forms: "eager" is what runs without torch.compile (`dgnet doctor` says which kernels: the C++ extension on a CPU, or what
DGNET_AGGREGATE chooses), "plain" the kernels in PyTorch's operators, "compiled" torch.compile, and "loop" the slow twin.
Measured is the output node of a stage, with an input edge from every other node. The bytes counted are the minimum: forward
reads each map and writes the sum; backward reads the sum's gradient and each map, and writes each map's gradient. Shapes that
are already in the output file are skipped, so an interrupted run can continue.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dgnet
from common import MODELS, measure_missing, read_rows, stage_shapes
from dgnet.bench import describe_hardware, versions
from dgnet.graph import aggregate, aggregate_by_loop, find_aggregation
from dgnet.graph._aggregate_plain import aggregate_backward_plain, aggregate_plain
from dgnet.inference import time_alternating

FORMS = ("loop", "plain", "eager", "compiled")


class _Plain(torch.autograd.Function):
    """Aggregation with the plain kernels."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, *features: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *features)
        return aggregate_plain(features, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weights, *features = ctx.saved_tensors
        weights_grad, grads = aggregate_backward_plain(grad, features, weights, None, True, [True] * len(features))
        return weights_grad, *grads


def sum_plain(features: Sequence[Tensor], weights: Tensor) -> Tensor:
    """`aggregate` with the plain kernels, also where others are at hand."""
    total: Tensor = _Plain.apply(weights, *features)
    return total


def main() -> None:
    """Measure every shape, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--shapes", nargs="+", metavar="CxHxWxE", help="some of the shapes: channels, height, width, edges")
    parser.add_argument("--map-mib", type=float, default=48, help="size of one map of a batch in MiB; should exceed the cache")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no new shape after this many minutes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "aggregate_cpu.json")
    parser.add_argument("--table", action="store_true", help="print the Markdown table of the file, measure nothing")
    args = parser.parse_args()
    if args.table:
        print(format_table(read_rows(args.output)))
        return
    dgnet.keep_freed_memory()
    print(format_table(measure_missing(list_rows(args), args.output, args.minutes, partial(measure, args=args))))


def list_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The distinct shapes of the stages' output nodes, or those of `--shapes`, in each dtype."""
    stages = (stage for name in MODELS for stage in stage_shapes(dgnet.create_model(f"dg_{name}"), 224))
    shapes = dict.fromkeys((channels, height, width, nodes - 1) for nodes, channels, height, width in stages)
    if args.shapes:
        chosen = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
        if unknown := [shape for shape in chosen if shape not in shapes]:
            sys.exit(f"no stage has the shapes {unknown}; the shapes are: {', '.join('x'.join(map(str, s)) for s in shapes)}")
        shapes = dict.fromkeys(chosen)
    names = ("channels", "height", "width", "edges")
    return [dict(zip(names, shape, strict=True)) | {"dtype": dtype} for dtype in args.dtypes for shape in shapes]


def measure(channels: int, height: int, width: int, edges: int, dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape: the copy and every form, in alternating rounds."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"device": args.device, "dtype": getattr(torch, dtype)}
    size = channels * height * width * options["dtype"].itemsize
    batch = max(1, round(args.map_mib * 2**20 / size))

    def draw() -> Tensor:
        return torch.randn(batch, channels, height, width, **options).to(memory_format=torch.channels_last)

    features = [draw().requires_grad_() for _ in range(edges)]
    weights = torch.rand(batch, edges, device=args.device).requires_grad_()
    upstream = draw()
    every: dict[str, Callable[..., Tensor]] = {
        "loop": aggregate_by_loop,
        "plain": sum_plain,
        "eager": aggregate,
        "compiled": torch.compile(aggregate),
    }
    forms = {name: every[name] for name in args.forms}
    sources = [feature.detach() for feature in features]
    targets = [torch.empty_like(source) for source in sources]

    def copy() -> None:
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)

    def both(form: Callable[..., Tensor]) -> None:
        torch.autograd.grad(form(features, weights), [weights, *features], upstream)

    def forward(form: Callable[..., Tensor]) -> None:
        with torch.no_grad():
            form(features, weights)

    runs: dict[str, Callable[[], None]] = {"copy": copy}
    for name, form in forms.items():
        runs[f"{name} forward"] = lambda form=form: forward(form)  # type: ignore[misc]
        runs[f"{name} both"] = lambda form=form: both(form)  # type: ignore[misc]
    seconds = time_alternating(runs, args.rounds, args.device)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    maps = {"forward": edges + 1, "both": (edges + 1) + (2 * edges + 1)}
    copy_rate = 2 * edges * batch * size / median["copy"]
    shares = {name: maps[name.split()[1]] * batch * size / median[name] / copy_rate for name in runs if name != "copy"}
    return {
        "batch_size": batch,
        "copy_bytes_per_second": copy_rate,
        "share_of_copy": shares,
        "eager_kernels": find_aggregation(torch.device(args.device).type).name,
        "rounds": args.rounds,
        "hardware": describe_hardware(args.device),
        "versions": versions(args.device),
    }


def format_table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: each form's rate as a percentage of the copy's."""
    names = list(dict.fromkeys(name for row in results for name in row["share_of_copy"]))
    lines = [f"| C × H × W | edges | dtype | batch | copy GB/s | {' | '.join(f'{name} %' for name in names)} |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(names))
    for r in results:
        cells = [f"{r['channels']} × {r['height']} × {r['width']}", str(r["edges"]), r["dtype"], str(r["batch_size"])]
        cells += [f"{r['copy_bytes_per_second'] / 1e9:.1f}", *(_percent(r["share_of_copy"].get(name)) for name in names)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f}"


if __name__ == "__main__":
    main()
