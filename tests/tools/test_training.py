"""Training with other people's loops."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2

import dgnet
from dgnet.cli import main
from dgnet.files import read_table
from dgnet.graph import find_stages
from tests.helpers.tools import require, run_page

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


def changed(network, start) -> set[str]:
    """The names of the parameters that training changed."""
    return {name for name, value in network.named_parameters() if not torch.equal(value.cpu(), start[name])}


def test_timm():
    scope = run_page("timm's training script")
    network, optimizer, average = scope["model"], scope["optimizer"], scope["average"]
    assert type(network) is type(dgnet.create_model("dg_resnet20"))
    assert scope["start"] == scope["epochs"] == 2
    assert {name.split(".")[0] for name, value in network.named_parameters() if value.grad is not None} >= {"layer1", "fc"}
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert min(scales) < max(scales) == 1  # the layer decay knows the network's layers
    assert all(group["lr"] < 0.1 * group["lr_scale"] for group in optimizer.param_groups)  # the schedule ran
    fresh = timm.create_model("dg_resnet20", num_classes=10)
    assert resume_checkpoint(fresh, "checkpoints/last.pth.tar", create_optimizer_v2(fresh, opt="sgd", layer_decay=0.9)) == 2
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in fresh.state_dict().items())
    loaded = timm.create_model("dg_resnet20", num_classes=10, checkpoint_path="checkpoints/last.pth.tar")
    averaged = average.module.state_dict()
    assert all(torch.equal(value, averaged[name]) for name, value in loaded.state_dict().items())
    assert not torch.equal(loaded.fc.weight, network.fc.weight)


def test_lightning():
    scope = run_page("Lightning")
    metrics = scope["trainer"].callback_metrics
    assert 0.3 < float(metrics["executed"]) <= 1
    network = scope["trainer"].lightning_module.network
    (checkpoint,) = Path("lightning_logs").rglob("*.ckpt")
    loaded = scope["Classifier"].load_from_checkpoint(checkpoint).network
    assert all(torch.equal(value.cpu(), loaded.state_dict()[name].cpu()) for name, value in network.state_dict().items())
    (optimizer,) = scope["trainer"].optimizers
    moved = {name for name, value in network.named_parameters() if optimizer.state[value]["momentum_buffer"].any()}
    assert {"layer1.node_gates.bias", "layer1.weighting.routers.0.weight", "layer3.nodes.2.conv1.weight"} <= moved


def test_accelerate():
    require("accelerate")
    network = dgnet.create_model("dg_resnet20", num_classes=10)
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    scope = run_page("accelerate", model=network)
    assert {"layer1.weighting.routers.0.weight", "layer3.nodes.2.conv1.weight", "fc.weight"} <= changed(network, start)
    assert torch.load("weights.pth").keys() == start.keys() | dict(network.named_buffers()).keys()
    with dgnet.record_connectivity(scope["model"]) as record:
        (batch, _), *_ = scope["loader"]
        logits = scope["model"](batch)
    assert len(record.adjacency) == 3
    assert logits.shape == (4, 10)
    scope["accelerator"].load_state("state")


def test_optuna(photos):
    require("optuna")
    recipe = {"data": str(photos), "image_size": 8, "batch_size": 4, "epochs": 1, "accelerator": "cpu", "threads": 1}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    study = run_page("Optuna")["study"]
    assert len(study.trials) == 2
    for trial in study.trials:
        options = yaml.safe_load(Path("trials", str(trial.number), "config.yaml").read_text())
        assert options["lr"] == trial.params["lr"]
        assert options["budget"] == trial.params["budget"]
        assert options["model_kwargs"]["node_gate_bias"] == trial.params["node_gate_bias"]
        assert trial.value == float(read_table(Path("trials", str(trial.number), "metrics.csv"))[-1]["val_top1"])
    best = f"trials/{study.best_trial.number}.yaml"
    assert main(["train", "--config", "recipe.yaml", "--config", best, "--output", "best"]) == 0
    assert len(find_stages(dgnet.load_checkpoint("best").build_network())) == 3
