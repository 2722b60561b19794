"""The figures in a card are those of the weights that are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dgnet.checkpoint import read_tensors
from dgnet.errors import UsageError
from dgnet.publishing import publish
from tests.helpers.published import NETWORKS, save

METRICS = "epoch,step,train_loss,val_top1,val_top5\n0,9,2.0,,\n0,9,,70.0,90.0\n1,19,,60.0,80.0\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with two epochs of ten steps: the first was the best one."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    network = save(folder / "model.safetensors", "dg_resnet20", **NETWORKS["dg_resnet20"])
    carried = read_tensors(folder / "model.safetensors")[1]
    state = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for name, steps in (("best", 10), ("middle", 15), ("last", 20)):
        torch.save({"state_dict": state, "dgnet": carried, "global_step": steps}, folder / "checkpoints" / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize(
    ("file", "top1"),
    [
        ("", 60.0),
        ("checkpoints/last.ckpt", 60.0),
        ("checkpoints/best.ckpt", 70.0),
        ("checkpoints/middle.ckpt", None),
        ("model.safetensors", 60.0),
    ],
)
def test_the_figures_are_those_of_the_published_checkpoint(file, top1, run, tmp_path):
    (run / "metrics.csv").write_text(METRICS)
    publish(run / file, tmp_path / "published")
    assert json.loads((tmp_path / "published" / "config.json").read_text())["dgnet"].get("top1") == top1
    card = (tmp_path / "published" / "README.md").read_text()
    assert ("top-1" in card) == (top1 is not None)


@pytest.mark.parametrize(
    ("metrics", "figures"),
    [
        ("epoch,step,val_top1\n1,19,60.0\n", {"top1": 60.0}),
        ("epoch,step,val_top1,val_top5\n1,19,nan,80\n", {"top5": 80.0}),
        ("epoch,step,val_ap,val_ap50\n1,19,30.5,50\n", {"ap": 30.5, "ap50": 50.0}),
        ("epoch,val_top1\n1,60.0\n", {}),  # without steps it is not known of which weights
        ("", {}),
    ],
)
def test_what_a_table_of_metrics_does_not_say_is_left_out(metrics, figures, run, tmp_path):
    (run / "metrics.csv").write_text(metrics)
    publish(run, tmp_path / "published")
    found = json.loads((tmp_path / "published" / "config.json").read_text())["dgnet"]
    assert {name: found[name] for name in ("top1", "top5", "ap", "ap50") if name in found} == figures


def test_a_damaged_table_of_metrics_is_refused(run, tmp_path):
    (run / "metrics.csv").write_text("epoch,step,val_top1\n1,19,much\n")
    with pytest.raises(UsageError, match=r"metrics.csv holds 'much', no number; give the figures with --evaluation"):
        publish(run, tmp_path / "published")
    publish(run, tmp_path / "published", evaluation={"top1": 61.0})
