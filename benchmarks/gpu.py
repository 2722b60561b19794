"""All GPU checks and measurements on one GPU, the most important first. Run it again to continue with the missing ones.

    python benchmarks/gpu.py --output OUT                                        # nine minutes
    python benchmarks/gpu.py --output OUT --data CIFAR10 --minutes 60            # and what the grids of experiments/ lack

Writes checks.txt, a JSON file with a line per row for each benchmark, and summary.md to OUT; the place of the JSON files is
benchmarks/results. Runs of the grids are resumed too; their rows are added to experiments/results.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
GRIDS = ("weightings_randwire", "weightings", "peers")
"""The grids of experiments/ that wait for a GPU, the most important first."""


def main() -> int:
    """Run the tests for GPUs first; measure only if they pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this many minutes")
    parser.add_argument("--compile-ahead", type=int, default=7, help="networks compiled in parallel before the first is timed")
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10's shards: also run what the grids of experiments/ lack")
    args = parser.parse_args()
    begun = time.monotonic()
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "checks.txt").open("w") as log:
        # `-W default`: unpinned versions of torch and Python may give other warnings.
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-W", "default", HERE.parent / "tests"]
        checks = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    print((args.output / "checks.txt").read_text()[-2000:])
    if checks.returncode:
        return checks.returncode

    def left() -> float:
        return args.minutes - (time.monotonic() - begun) / 60

    def run(script: str, name: str, minutes: float, *options: str, **environment: str) -> None:
        if left() > 0:
            command = [sys.executable, HERE / script, "--device=cuda", f"--minutes={min(left(), minutes):.2f}"]
            command += [f"--output={args.output / name}", *options]
            done = subprocess.run(command, env={**os.environ, **environment})
            if done.returncode:
                print(f"gpu: {script} {' '.join(options)} failed with status {done.returncode}", file=sys.stderr)

    networks = ("networks.py", "networks_cuda.json", args.minutes, "--dtypes=bfloat16", f"--compile-ahead={args.compile_ahead}")
    run(*networks, "--tasks", "train", "--forms", "compiled", "--train-batch-size", "64")
    run("early_gates.py", "early_gates_cuda.json", 2.0, "--dtype", "bfloat16")
    aggregate = ("--dtypes", "bfloat16", "--map-mib", "256")
    run("aggregate.py", "aggregate_cuda.json", 1.0, *aggregate, "--forms", "plain", "compiled", "loop")
    few = (*aggregate, "--shapes", "256x56x56x4", "512x28x28x5", "1024x14x14x24")
    run("aggregate.py", "aggregate_triton_cuda.json", 0.7, *few, "--forms", "eager", "compiled", DGNET_AGGREGATE="triton")
    for switch in ("TORCHINDUCTOR_SPLIT_REDUCTIONS=0", "TORCHINDUCTOR_COORDINATE_DESCENT_TUNING=1"):
        name, value = switch.split("=")
        output = f"aggregate_{name.removeprefix('TORCHINDUCTOR_').lower()}_cuda.json"
        run("aggregate.py", output, 0.5, *few, "--forms", "compiled", **{name: value})
    run("sparse_mode.py", "sparse_cuda.json", 1.5, "--batches", "8", "64", "256")
    run(*networks, "--tasks", "train", "--forms", "eager", "--train-batch-size", "64")
    run(*networks, "--tasks", "infer", "--forms", "cuda-graphs", "--infer-batch-sizes", "1")
    run(*networks, "--tasks", "infer", "--forms", "compiled", "--infer-batch-sizes", "64")
    if args.data is not None:
        for grid in GRIDS:
            if left() > 1:
                command = [sys.executable, "-m", "dgnet", "experiment", "run", HERE.parent / "experiments" / f"{grid}.yaml"]
                command += [f"--data={args.data}", f"--output={args.output / 'runs'}", f"--minutes={left():.2f}"]
                subprocess.run(command)
    write_summary(args.output)
    return 0


def write_summary(output: Path) -> None:
    """Write every table to summary.md, and print it."""
    parts = []
    for path in sorted(output.glob("*_cuda.json")):
        script = next(name for name in ("networks", "early_gates", "aggregate", "sparse") if path.name.startswith(name))
        script = "sparse_mode" if script == "sparse" else script
        command = [sys.executable, HERE / f"{script}.py", "--table", f"--output={path}"]
        table = subprocess.run(command, capture_output=True, text=True).stdout
        parts.append(f"## {path.name}\n\n{table}")
    (output / "summary.md").write_text("\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())
