from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import dgnet
from dgnet.errors import UsageError
from dgnet.training import TrainConfig, train
from dgnet.training._freezing import Freezing
from dgnet.training._parameter_groups import build_parameter_groups
from tests.helpers.runs import options


def network() -> nn.Module:
    torch.manual_seed(0)
    return dgnet.create_model("dg_resnet20", num_classes=3, channels=(4, 4, 4))


def test_the_first_groups_or_all_but_the_head_are_frozen():
    names = [name for name, _ in network().named_parameters()]
    assert Freezing(network(), "m", "head").names == {name for name in names if not name.startswith("fc.")}
    assert Freezing(network(), "m", "2").names == {n for n in names if n.startswith(("conv1.", "bn1.", "layer1."))}
    assert "layer1.weighting.tau" in names


def test_routers_and_gates_are_frozen_with_the_last_block_of_their_stage():
    sizes = {"img_size": 32, "depth": 3, "embed_dim": 12, "num_heads": 2}
    one = dgnet.create_model("vit_tiny_patch16_224", dynamic=True, node_gate="hard", **sizes)
    routing = {name for name, _ in one.named_parameters() if ".weighting." in name or ".node_gates." in name}
    assert routing
    for groups, nodes in (("2", "0"), ("3", "01"), ("4", "012")):  # the stem, then blocks
        frozen = Freezing(one, "m", groups, epochs=1).names
        assert {name for name in frozen if ".nodes." in name} == {
            name for name, _ in one.named_parameters() if name.startswith(tuple(f"blocks.0.nodes.{node}." for node in nodes))
        }
        assert frozen & routing == (routing if len(nodes) == 3 else set())


def test_what_is_frozen_for_the_whole_run_has_no_group_in_the_optimizer():
    one = network()
    Freezing(one, "m", "head")
    groups = build_parameter_groups(one, TrainConfig())
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in one.fc.parameters()}


@pytest.mark.parametrize("needs_gradients", [False, True])
def test_frozen_epochs_change_only_the_rest_and_then_everything_changes(needs_gradients):
    one = network().train()
    freezing = Freezing(one, "m", "3", epochs=1)
    optimizer = torch.optim.SGD(one.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    states = [{name: tensor.clone() for name, tensor in one.state_dict().items()}]
    for epoch in range(2):
        for step in range(2):
            one.train()
            freezing.apply(epoch, needs_gradients)
            assert all((p.grad is None) for p in one.parameters()) or step or epoch
            optimizer.zero_grad()
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            F.cross_entropy(one(images), torch.tensor([0, 1, 2, 0])).backward()
            assert needs_gradients or epoch or one.conv1.weight.grad is None
            freezing.drop_gradients()
            optimizer.step()
        states.append({name: tensor.clone() for name, tensor in one.state_dict().items()})
    frozen = ("conv1.", "bn1.", "layer1.", "layer2.")
    moved = [{n for n in states[0] if not torch.equal(a[n], b[n])} for a, b in pairwise(states)]
    assert not [name for name in moved[0] if name.startswith(frozen)]  # nor the statistics
    assert {"fc.weight", "layer3.nodes.0.conv1.weight", "layer3.nodes.0.bn1.running_mean"} <= moved[0]
    assert {"conv1.weight", "bn1.running_mean", "layer1.nodes.0.conv1.weight", "layer2.weighting.tau"} <= moved[1]


def test_both_ways_of_freezing_give_the_same_weights():
    found = []
    for needs_gradients in (False, True):
        one = network().train()
        freezing = Freezing(one, "m", "2", epochs=1)
        optimizer = torch.optim.AdamW(one.parameters(), lr=0.01)
        for epoch in range(2):
            freezing.apply(epoch, needs_gradients)
            optimizer.zero_grad()
            images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(epoch))
            F.cross_entropy(one(images), torch.tensor([0, 1, 2, 0])).backward()
            freezing.drop_gradients()
            nn.utils.clip_grad_norm_(one.parameters(), 0.1)
            optimizer.step()
        found.append(one.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name], rtol=1e-6, atol=1e-7)


def test_a_run_that_trains_only_the_head(data, tmp_path, capsys):
    train(TrainConfig(**options(data, tmp_path / "first", epochs=1)))
    weights = tmp_path / "first" / "model.safetensors"
    capsys.readouterr()
    train(TrainConfig(**options(data, tmp_path / "head", epochs=2, weights=str(weights), freeze="head")))
    said = capsys.readouterr().err
    assert "not trained in the whole run: 3,065 of 3,075 parameters (conv1, bn1, layer1, layer2, layer3)" in said
    before, after = load_file(weights), load_file(tmp_path / "head" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"fc.weight", "fc.bias"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"freeze": "head"}, "--freeze head would freeze random weights"),
        ({"freeze": "0", "weights": "w"}, "--freeze must be head, or a number of groups from 1 on, got '0'"),
        ({"freeze": "layer1", "weights": "w"}, "--freeze must be head, or a number"),
        ({"freeze_epochs": 2}, "--freeze-epochs needs --freeze"),
        ({"freeze": "1", "freeze_epochs": 20, "weights": "w"}, "--freeze-epochs 20 is not below --epochs 20"),
    ],
)
def test_bad_options_of_freezing_are_one_line(given, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**given)


def test_something_must_be_left_to_train():
    with pytest.raises(UsageError, match="--freeze 5 leaves nothing to train: dg_resnet20 has 5 groups; use 4 or less"):
        Freezing(network(), "dg_resnet20", "5")
