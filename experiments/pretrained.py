"""Train the networks whose weights come with the package, evaluate them, and publish them in `src/dgnet/models/pretrained`.

    python experiments/pretrained.py --data CIFAR10 --output RUNS

A run that was interrupted goes on; one that is finished is only evaluated and published. `tests/models/pretrained.json`,
what the networks say about stored images, is written too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "src" / "dgnet" / "models" / "pretrained"
CIFAR10 = ["--config", str(ROOT / "recipes" / "cifar10" / "resnet_10epochs.yaml"), "--evaluate-every", "10"]
NETWORKS = {
    "dg_resnet20.digits_budget50": ["--data", "digits", "--model", "dg_resnet20", "--image-size", "16", "--budget", "0.5"],
    "resnet20.cifar10": [*CIFAR10, "--model", "resnet20"],
    "dg_resnet20.cifar10": [*CIFAR10, "--model", "dg_resnet20"],
    "dg_resnet32.cifar10": [*CIFAR10, "--model", "dg_resnet32"],
    # Fine-tuned from the network above, which is also its teacher.
    "dg_resnet32.cifar10_budget60": [
        *CIFAR10,
        *("--model", "dg_resnet32", "--budget", "0.6", "--epochs", "5", "--lr", "0.005", "--evaluate-every", "5"),
        *("--weights", "dg_resnet32.cifar10", "--teacher", "dg_resnet32.cifar10"),
    ],
}
"""Name of the published network -> the options of its training. A later one may start from an earlier one."""
SOURCES = {
    "digits": "handwritten digits of scikit-learn, every fifth of a class held out for evaluation",
    "cifar10": "CIFAR-10, all training images, as JPEGs of quality 75 with 4:2:0 chroma; evaluated on the test images",
}
"""Part of a network's tag -> what it was trained on."""


def main() -> int:
    """Parse the options, then train, evaluate and publish; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards cifar10-train-*.tar, cifar10-test-*.tar")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="folder for run folders")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="only these")
    parser.add_argument("--threads", type=int, help="of each training; by default one per core")
    args = parser.parse_args()
    for name in args.networks:
        words = list(NETWORKS[name])
        if "--config" in words:
            words += ["--data", str(args.data / "cifar10-train-{000000..000004}.tar"), "--cache", "true"]
            words += ["--val-data", str(args.data / "cifar10-test-000000.tar")]
        if args.threads:
            words += ["--threads", str(args.threads)]
        run = args.output / name
        call("train", "--resume", str(run)) if run.exists() else call("train", *words, "--seed", "0", "--output", str(run))
        evaluation = run / "evaluation.json"
        evaluation.write_text(call("evaluate", str(run), "--json"), encoding="utf-8")
        target = ["--evaluation", str(evaluation), "--license", "apache-2.0", "--to", str(TARGET / name)]
        call("publish", str(run), *target)
        (TARGET / name / "README.md").unlink()  # a card says how to load a folder; these are loaded by their names
        describe(name)
    record_answers()
    return 0


def call(command: str, *words: str) -> str:
    """Run a `dgnet` command; returns what it prints. Ends this process with its status if it fails."""
    done = subprocess.run([sys.executable, "-m", "dgnet", command, *words], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def describe(name: str) -> None:
    """Add to the network's config.json what it was trained on, and with which recipe."""
    path = TARGET / name / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    words = NETWORKS[name]
    recipe = Path(words[words.index("--config") + 1]).relative_to(ROOT) if "--config" in words else None
    source = next(source for part, source in SOURCES.items() if part in name)
    config["dgnet"] |= {"source": source, "recipe": None if recipe is None else recipe.as_posix()}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def record_answers() -> None:
    """Write the logits of every packaged network for the stored images, in a process that finds the new weights."""
    code = "from tests.models.test_pretrained import record; record()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
