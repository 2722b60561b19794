"""The exported forms in onnxruntime on a CPU: is the sparse one faster than the dense one?

    python benchmarks/export.py --model dg_resnet50 --image-size 224

Gates on blocks are drawn at random, so that some blocks are skipped for some images. Both exported forms and both modes of
PyTorch are measured in alternating rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import onnxruntime
import torch
from torch import nn

import dgnet
from common import ratios
from dgnet._cost import cost_model
from dgnet.bench import describe_hardware, versions
from dgnet.graph import find_stages, record_connectivity
from dgnet.inference import export_network, fold_batch_norms, set_mode, time_alternating
from dgnet.inference._export import save_export
from dgnet.inference._sparse import MODES


def main() -> None:
    """Export, measure, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dg_resnet50")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument(
        "--gate-bias", type=float, default=0.3, help="bias of the drawn gates: a larger one keeps more blocks alive"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    dgnet.keep_freed_memory()
    torch.manual_seed(0)
    network = draw_gates(dgnet.create_model(args.model, node_gate="hard", node_gate_bias=args.gate_bias).eval())
    costs = cost_model(network, args.image_size)
    folded = fold_batch_norms(network, args.image_size).to(memory_format=torch.channels_last)
    print("| network | batch | alive multiply-adds | form | ms | dense / sparse | range |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sessions = {}
        for mode in MODES:
            path = Path(folder) / f"{mode}.onnx"
            with torch.inference_mode(False):
                save_export(export_network(network, args.image_size, mode), path, "onnx", {})
            sessions[mode] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for batch in args.batches:
            images = torch.randn(batch, 3, args.image_size, args.image_size)
            shown = images.contiguous(memory_format=torch.channels_last)
            with record_connectivity(set_mode(folded, "sparse")) as record:
                folded(shown)
            executed = costs.executed(record.ran, [matrix != 0 for matrix in record.adjacency]).mean() / costs.dense
            steps = {f"onnxruntime {mode}": partial(sessions[mode].run, None, {"images": images.numpy()}) for mode in MODES}
            steps |= {f"PyTorch {mode}": partial(run_mode, folded, mode, shown) for mode in MODES}
            seconds = time_alternating(steps, args.rounds)
            for form, times in seconds.items():
                runtime, mode = form.split()
                ratio, least, greatest = ratios(seconds[f"{runtime} dense"], times)
                speedup, span = (f"{ratio:.2f}", f"{least:.2f} … {greatest:.2f}") if mode == "sparse" else ("", "")
                milliseconds = 1000 * statistics.median(times)
                print(
                    f"| {args.model} | {batch} | {executed:.2f} | {form} | {milliseconds:.1f} | {speedup} | {span} |",
                    flush=True,
                )
    packages = versions("cpu") | {"onnxruntime": onnxruntime.__version__}
    print(f"\n{describe_hardware('cpu')}; {', '.join(f'{name} {version}' for name, version in packages.items())}")


def draw_gates(network: nn.Module) -> nn.Module:
    """Set the gates' weights, in place, so that decisions differ between images; returns the network."""
    for stage in find_stages(network):
        assert stage.node_gates is not None
        for column in stage.node_gates.columns.values():
            nn.init.normal_(column.weight, std=2.0)  # type: ignore[arg-type]
    return network


def run_mode(network: nn.Module, mode: str, images: torch.Tensor) -> object:
    """Run one forward pass in `mode`."""
    return set_mode(network, mode)(images)


if __name__ == "__main__":
    main()
