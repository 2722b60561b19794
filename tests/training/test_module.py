from __future__ import annotations

import copy

import pytest
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import dispatch_clip_grad
from torch import Tensor

import dgnet
from dgnet.errors import UsageError
from dgnet.training import TrainConfig, train
from dgnet.training._module import Classifier
from dgnet.training._optimizer import build_optimizer
from dgnet.training._parameter_groups import build_parameter_groups
from tests.helpers.runs import options


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
    for name, kwargs in (
        ("resnet20", {}),
        ("dg_resnet20", {"weighting": "fixed"}),
        ("dg_resnet20", {"learn_threshold": False}),
    ):
        network = dgnet.create_model(name, **kwargs)
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


def groups_by_name(model: str, layer_decay: float | None = None, **options: object) -> dict[str, dict[str, float]]:
    """For each parameter its weight decay and its share of the learning rate."""
    network = dgnet.create_model(model, node_gate="hard") if model.startswith("dg_") else dgnet.create_model(model)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = build_parameter_groups(network, TrainConfig(weight_decay=0.5, **options), layer_decay)
    found = {}
    for group in groups:
        what = {"decay": group["weight_decay"], "share": group.get("lr_scale", 1.0)}
        found |= {names[id(parameter)]: what for parameter in group["params"]}
    assert len(found) == len(names) == sum(len(group["params"]) for group in groups)
    return found


def is_routing(name: str) -> bool:
    return ".weighting." in name or ".node_gates." in name


def test_routers_and_gates_take_their_share_of_the_rate_and_keep_their_weight_decay():
    for decay in ("weights", "all", "none"):
        before = groups_by_name("dg_resnet20", routing_decay=decay)
        after = groups_by_name("dg_resnet20", routing_decay=decay, router_lr=0.2)
        for name, group in after.items():
            is_router = is_routing(name) and not name.endswith(".tau")
            assert group == {"decay": before[name]["decay"], "share": 0.2 if is_router else 1.0}


@pytest.mark.parametrize("choice", ["same", "adamw"])
def test_muon_leaves_routers_to_adamw_if_asked(choice):
    network = dgnet.create_model("dg_resnet20", channels=(4, 4, 4), weighting="signed", node_gate="hard")
    config = TrainConfig(optimizer="nmuon", router_optimizer=choice)
    optimizer = create_optimizer_v2(build_parameter_groups(network, config), opt="nmuon", lr=0.1)
    network(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    routing = {id(p) for n, p in network.named_parameters() if ".weighting." in n or ".node_gates." in n}
    orthogonalised = {id(p) for p, state in optimizer.state.items() if state.get("use_muon")}
    matrices = {id(p) for p in network.parameters() if p.ndim > 1}
    assert orthogonalised & matrices - routing
    assert bool(orthogonalised & routing) == (choice == "same")


@pytest.mark.parametrize("decay", ["weights", "all", "none"])
def test_routing_has_an_optimiser_of_its_own_whatever_the_others_have(decay):
    network = dgnet.create_model("dg_resnet20", channels=(4, 4, 4), weighting="linear", node_gate="hard").train()
    twin = copy.deepcopy(network)
    options = {"lr": 0.1, "router_lr": 0.02, "threshold_lr": 0.5, "weight_decay": 0.01, "routing_decay": decay}
    config = TrainConfig(optimizer="sgd", router_optimizer="adamw", **options)
    optimizer = build_optimizer(build_parameter_groups(network, config), config)
    scale_rates(optimizer, 0.5)
    # The twin: torch's own optimisers, the routing parameters one by one.
    plain = [p for n, p in twin.named_parameters() if not is_routing(n)]
    groups = {id(p): group for group in build_parameter_groups(twin, config) for p in group["params"]}
    others = []
    for name, p in twin.named_parameters():
        if is_routing(name) and p.requires_grad:
            share = 0.5 if name.endswith(".tau") else 0.02
            assert groups[id(p)].get("lr_scale", 1.0) == share
            others.append({"params": [p], "lr": 0.05 * share, "weight_decay": groups[id(p)]["weight_decay"]})
    decayed = [{"params": [p], "weight_decay": 0.01 if p.ndim > 1 else 0.0} for p in plain]
    pair = (torch.optim.SGD(decayed, 0.05, 0.9, nesterov=True), torch.optim.AdamW(others, betas=(0.9, 0.999), eps=1e-8))
    for step in range(4):
        if step == 2:  # as a resumed run does
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = build_optimizer(build_parameter_groups(network, config), config)
            optimizer.load_state_dict(state)
        images = torch.randn(4, 3, 8, 8)
        network(images).square().mean().backward()
        twin(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for one in pair:
            one.step()
            one.zero_grad()
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-6, msg=name)


def test_learned_weights_have_the_optimiser_of_routing_and_no_decay():
    network = dgnet.create_model("dg_resnet20", channels=(4, 4, 4), weighting="learned", weight_groups=2)
    config = TrainConfig(optimizer="sgd", router_optimizer="adamw", weight_decay=0.1)
    first, second = build_optimizer(build_parameter_groups(network, config), config).parts
    alphas = {id(p) for name, p in network.named_parameters() if name.endswith("alpha")}
    assert {id(p) for group in second.param_groups for p in group["params"]} == alphas
    assert all(group["weight_decay"] == 0 for group in second.param_groups)
    assert isinstance(first, torch.optim.SGD)
    with pytest.raises(UsageError, match="--router-optimizer adamw has no effect: no weight or gate of this network learns"):
        build_parameter_groups(dgnet.create_model("resnet20"), config)


def scale_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """What timm's schedules do: the share of a group times the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["lr"] * group.get("lr_scale", 1.0)


@pytest.mark.parametrize("norm_decay", [False, True])
def test_the_rate_decays_from_layer_to_layer_as_in_timm_but_not_of_routers(norm_decay):
    found = groups_by_name("dg_resnet20", 0.5, norm_decay=norm_decay, router_lr=0.3, threshold_lr=0.1)
    layers = group_parameters(
        dgnet.create_model("dg_resnet20"), dgnet.create_model("dg_resnet20").group_matcher(), reverse=True
    )
    last = max(layers.values())
    without = groups_by_name("dg_resnet20", norm_decay=norm_decay)
    for name, group in found.items():
        share = 0.5 ** (last - layers[name]) if not is_routing(name) else 0.1 if name.endswith(".tau") else 0.3
        assert group == {"decay": without[name]["decay"], "share": pytest.approx(share)}
    assert found["fc.weight"]["share"] == 1
    assert found["conv1.weight"]["share"] < 0.01


def test_the_layer_decay_of_a_static_network_is_timms():
    network = dgnet.create_model("resnet18")
    own = build_parameter_groups(network, TrainConfig(weight_decay=0.5), 0.8)
    theirs = param_groups_layer_decay(network, 0.5, layer_decay=0.8)
    assert [{**group, "params": len(group["params"])} for group in own] == [
        {**group, "params": len(group["params"])} for group in theirs
    ]


@pytest.mark.parametrize("mode", ["value", "agc"])
def test_gradients_are_clipped_as_timm_does(mode, data, tmp_path, monkeypatch):
    seen: dict[str, Tensor] = {}

    def note(parameters: list[Tensor], value: float, mode: str) -> None:
        before = [p.grad.clone() for p in parameters]
        dispatch_clip_grad(parameters, value, mode)
        if not seen:
            heads = 2 if mode == "agc" else 0
            assert len(parameters) == len(list(dgnet.create_model("dg_resnet20").parameters())) - heads
            seen["largest"] = max(p.grad.abs().max() for p in parameters)
            assert any(not torch.equal(p.grad, old) for p, old in zip(parameters, before, strict=True))

    monkeypatch.setattr("dgnet.training._module.dispatch_clip_grad", note)
    train(TrainConfig(**options(data, tmp_path / "run", epochs=1, clip_grad=0.001, clip_mode=mode)))
    assert seen["largest"] <= 0.001 or mode == "agc"


def test_the_optimizer_takes_its_own_numbers(data, tmp_path):
    made = []

    class Noted(Classifier):
        def configure_optimizers(self) -> object:
            made.append(super().configure_optimizers())
            return made[-1]

    more = {"epochs": 1, "optimizer": "adamw", "opt_betas": [0.8, 0.7], "opt_eps": 1e-3, "layer_decay": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dgnet.training._train.Classifier", Noted)
        result = train(TrainConfig(**options(data, tmp_path / "run", **more)))
    assert result.metrics["lr"] == pytest.approx(0.05 * (1 + 5 * 5 / 6) / 6)  # of the last of 6 steps of warm-up, of no layer
    group = made[0]["optimizer"].param_groups[0]
    assert (group["betas"], group["eps"]) == ((0.8, 0.7), 1e-3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"opt_betas": [0.9, 0.99]}, "--optimizer sgd has no betas"),
        ({"opt_eps": 1e-8}, "--optimizer sgd has no epsilon"),
        ({"optimizer": "adamw", "opt_betas": [0.9]}, "--opt-betas must be 2 numbers from 0 to below 1 for adamw, got"),
        ({"clip_mode": "agc"}, "--clip-mode agc needs a value to clip at"),
        ({"layer_decay": 0.0}, "--layer-decay must be above 0"),
        ({"drop": 0.1, "model_kwargs": {"drop_rate": 0.2}}, "--drop and --model-kwargs.drop_rate are the same"),
    ],
)
def test_bad_options_of_the_optimizer_are_one_line(given, message):
    with pytest.raises(UsageError, match=message):
        TrainConfig(**given)


def test_a_network_without_drop_path_says_so(tmp_path):
    with pytest.raises(UsageError, match=r"--drop-path 0.1: vgg11 has no option drop_path_rate; leave it out"):
        train(TrainConfig(model="vgg11", drop_path=0.1, output=str(tmp_path / "run")))
    assert TrainConfig(drop=0.2, drop_path=0.1).network_kwargs == {"drop_rate": 0.2, "drop_path_rate": 0.1}


def test_images_are_mixed_in_even_batches_only(data, tmp_path):
    with pytest.raises(UsageError, match=r"a batch has 1 \(--batch-size 4\); make it an even number"):
        train(TrainConfig(**options(data, tmp_path / "run", mixup=0.5, accumulate=4)))


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
