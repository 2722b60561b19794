"""What dgnet does, in two minutes: `make demo`.

Trains the default DG-Net on handwritten digits with a budget of half of the multiply-adds, then shows what it has learned: its
accuracy, how much of it an image executes, whether that pays on this machine, and which path each image takes.
"""

from __future__ import annotations

from pathlib import Path

import dgnet
from dgnet.analysis import analyze, write_explorer
from dgnet.checkpoint import load_checkpoint
from dgnet.evaluation import open_evaluation_data


def main(epochs: int = 20) -> None:
    """Train, evaluate, draw; prints a table and the page to open."""
    dgnet.keep_freed_memory()
    run = dgnet.train(dgnet.TrainConfig(budget=0.5, epochs=epochs)).folder
    checkpoint = load_checkpoint(run)
    network = checkpoint.build_network()
    images = open_evaluation_data(checkpoint)
    found = dgnet.evaluate(network, images, mode="sparse", static=checkpoint.build_static(), speed=True)
    share = found.executed_multiply_adds / found.dense_multiply_adds
    speed = found.images_per_second or {}
    pictures = Path(run) / "analysis"
    analyze(network, images, pictures)
    page = write_explorer(
        network, images, pictures / "explorer.html", class_names=checkpoint.class_names, model=checkpoint.model, source="digits"
    )
    rows = {
        "accuracy on the digits held out": f"{found.top1:.1f} %",
        "multiply-adds executed, mean": f"{share:.0%} of {found.dense_multiply_adds / 1e6:.2f} million",
        "different wirings": f"{found.distinct_wirings} for {found.images} images",
        "images/s, sparse": f"{speed['sparse']:,.0f}",
        "images/s, dense": f"{speed['dense']:,.0f} ({speed['sparse'] / speed['dense']:.2f} times as many sparse)",
        "images/s, static ResNet-20": f"{speed['static']:,.0f} ({speed['sparse'] / speed['static']:.2f} times as many sparse)",
    }
    print(f"\n{checkpoint.model} with a budget of 0.5:")
    for name, value in rows.items():
        print(f"  {name:<34}{value}")
    print(f"\nthe path of each image: {page.resolve().as_uri()}")
    print(f"figures: {pictures.resolve()}")


if __name__ == "__main__":
    main()
