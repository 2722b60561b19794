"""All GPU checks and measurements on one GPU, in under ten minutes. Run it again to continue with the missing ones.

    python benchmarks/gpu.py --output OUT

Writes networks_cuda.json, aggregate_cuda.json, sparse_cuda.json and checks.txt to OUT; their place is benchmarks/results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Run the tests for GPUs first; measure only if they pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "results")
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing new after this many minutes")
    parser.add_argument("--compile-ahead", type=int, default=7, help="networks compiled in parallel before the first is timed")
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

    def run(script: str, name: str, minutes: float, *options: str) -> None:
        left = args.minutes - (time.monotonic() - begun) / 60
        output = f"--output={args.output / name}"
        if left > 0:
            command = [sys.executable, HERE / script, "--device=cuda", f"--minutes={min(left, minutes)}", output, *options]
            subprocess.run(command, check=True)

    networks = ("networks.py", "networks_cuda.json", args.minutes, "--dtypes=bfloat16", f"--compile-ahead={args.compile_ahead}")
    run(*networks, "--tasks", "train", "--forms", "compiled", "--train-batch-size", "64")
    run("sparse_mode.py", "sparse_cuda.json", 1.5, "--batches", "8", "64", "256")
    run("aggregate.py", "aggregate_cuda.json", 1.0, "--dtypes", "bfloat16", "--map-mib", "256")
    run(*networks, "--tasks", "infer", "--forms", "cuda-graphs", "--infer-batch-sizes", "1")
    run(*networks, "--tasks", "infer", "--forms", "compiled", "--infer-batch-sizes", "64")
    return 0


if __name__ == "__main__":
    sys.exit(main())
