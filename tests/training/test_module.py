from __future__ import annotations

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

import dgnet
from dgnet.errors import UsageError
from dgnet.training import TrainConfig
from dgnet.training._parameter_groups import build_parameter_groups


def test_parameters_fall_into_groups_once_and_thresholds_take_their_share_of_the_rate():
    network = dgnet.create_model("dg_resnet20")
    config = TrainConfig(threshold_lr=0.1, weight_decay=0.5, lr=2.0)
    groups = build_parameter_groups(network, config)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in network.parameters())
    thresholds = {id(stage.weighting.tau) for stage in network.stages}
    optimizer = create_optimizer_v2(groups, opt="sgd", lr=config.lr, weight_decay=config.weight_decay, momentum=0.9)
    CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=1.0, t_in_epochs=False).step_update(2)
    rates = {}
    for group in optimizer.param_groups:
        own = {id(parameter) for parameter in group["params"]}
        has_thresholds = bool(own & thresholds)
        assert not has_thresholds or own == thresholds
        decays = all(p.ndim > 1 for p in group["params"])
        assert group["weight_decay"] == (0.5 if decays else 0)
        rates[has_thresholds] = group["lr"]
    assert rates[False] > 1
    assert abs(rates[True] - 0.1 * rates[False]) < 1e-9


def test_routing_decays_as_asked():
    def decaying(choice: str) -> set[str]:
        network = dgnet.create_model("dg_resnet20")
        groups = build_parameter_groups(network, TrainConfig(routing_decay=choice, weight_decay=0.5, threshold_lr=0.1))
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in network.parameters())
        ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        return {name for name, parameter in network.named_parameters() if id(parameter) in ids}

    matrices = {name for name, p in dgnet.create_model("dg_resnet20").named_parameters() if p.ndim > 1}
    routing = {name for name, _ in dgnet.create_model("dg_resnet20").named_parameters() if "weighting" in name}
    assert decaying("weights") == matrices
    assert decaying("none") == matrices - routing
    assert decaying("all") == matrices | routing


def test_without_thresholds_there_is_nothing_to_set_apart():
    for name, options in (
        ("resnet20", {}),
        ("dg_resnet20", {"weighting": "fixed"}),
        ("dg_resnet20", {"learn_threshold": False}),
    ):
        network = dgnet.create_model(name, **options)
        assert len(build_parameter_groups(network, TrainConfig(threshold_lr=0.1))) == 2


def test_a_step_moves_thresholds_by_their_share():
    network = dgnet.create_model("dg_resnet20")
    optimizer = create_optimizer_v2(build_parameter_groups(network, TrainConfig(threshold_lr=0.0)), opt="sgd", lr=0.1)
    CosineLRScheduler(optimizer, t_initial=10, t_in_epochs=False).step_update(0)
    before = [stage.weighting.tau.detach().clone() for stage in network.stages]
    bias = network.layer1.weighting.routers["0"].bias.detach().clone()
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(stage.weighting.tau, tau) for stage, tau in zip(network.stages, before, strict=True))
    assert not torch.equal(network.layer1.weighting.routers["0"].bias, bias)


def test_normalisation_and_biases_decay_where_asked_for():
    def decaying(norm_decay: bool, weighting: str) -> set[str]:
        network = dgnet.create_model("dg_resnet20", weighting=weighting)
        groups = build_parameter_groups(network, TrainConfig(norm_decay=norm_decay, weight_decay=0.5))
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in network.parameters())
        ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
        return {name for name, parameter in network.named_parameters() if id(parameter) in ids}

    for weighting in ("routed", "learned"):
        more = decaying(True, weighting) - decaying(False, weighting)
        parameters = dgnet.create_model("dg_resnet20", weighting=weighting).named_parameters()
        assert more == {name for name, p in parameters if p.ndim <= 1 and "weighting" not in name}


def test_the_rate_follows_the_batch_size_where_it_is_meant_for_another():
    assert TrainConfig(lr=0.4, batch_size=256).peak_lr == 0.4
    assert TrainConfig(lr=0.4, batch_size=256, lr_batch_size=1024).peak_lr == 0.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("500 steps", (500, None)),
        ("1 step", (1, None)),
        ("15 minutes", (None, 900)),
        ("0.5min", (None, 30)),
        ("2 minutes", (None, 120)),
    ],
)
def test_how_often_checkpoints_are_written(given, expected):
    assert TrainConfig(checkpoint_every=given).checkpoint_interval() == expected


@pytest.mark.parametrize("given", ["5", "0 steps", "1.5 steps", "5 hours", "30 s", "-1 minutes", "1..2 minutes"])
def test_what_is_no_interval_of_checkpoints(given):
    with pytest.raises(UsageError, match="--checkpoint-every must be like '500 steps' or '15 minutes'"):
        TrainConfig(checkpoint_every=given)
