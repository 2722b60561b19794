"""Training of InstaNAS: the controller's gradient, the three phases, and a run through all of them."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

import dgnet
from dgnet.checkpoint import load_checkpoint
from dgnet.cli import main
from dgnet.comparison._compare import find_trade_off
from dgnet.errors import UsageError
from dgnet.files import read_table
from dgnet.training import Interrupted, TrainConfig, _search_module, read_run, train
from dgnet.training._latency import read_latencies
from dgnet.training._search import LatencyRange, Phases, Window, bound_probabilities, policy_losses, reward_images
from dgnet.training._search_module import PhasedSchedule, SearchClassifier
from tests.helpers.command import ask, refuse
from tests.helpers.runs import assert_same

TINY = {
    "layers": [1, 1],
    "channels": [4, 6],
    "strides": [1, 2],
    "stem_channels": 4,
    "head_channels": 8,
    "controller_channels": [4, 6],
}


def options(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Options of a run of 5 epochs of 6 steps: meta-graph, controller, meta-graph, and two of fine-tuning."""
    own = {"model": "instanas_cifar", "model_kwargs": TINY, "image_size": 8, "batch_size": 4, "epochs": 5, "search_epochs": 2}
    fixed = {"tune_epochs": 2, "lr": 0.05, "controller_lr": 0.02, "threads": 1, "accelerator": "cpu", "latency_target": 0.9}
    return {**own, **fixed, "data": str(data), "output": str(output), **more}


def as_words(given: dict[str, Any]) -> list[str]:
    return [
        word
        for name, value in given.items()
        for word in (f"--{name.replace('_', '-')}", value if isinstance(value, str) else json.dumps(value))
    ]


def test_the_controllers_gradient_is_the_reinforce_estimate_by_hand():
    """Two modules of one cell, z = (0.4, -1), a = (open, closed), reward 7 against 4 of the baseline; exploration 0.8."""
    logits = torch.tensor([[[0.4, -1.0]]], dtype=torch.float64, requires_grad=True)
    opened, advantage = torch.tensor([[[True, False]]]), torch.tensor([7.0 - 4.0], dtype=torch.float64)
    policy_losses(logits, opened, advantage, exploration=0.8, entropy=0.0).sum().backward()
    by_hand = []
    for z, a in ((0.4, 1.0), (-1.0, 0.0)):
        p = 1 / (1 + 2.718281828459045**-z)
        q = 0.8 * p + 0.2 * (1 - p)
        # ∂/∂z of -3 · log(q if a else 1 - q), where ∂q/∂z = (2 · 0.8 - 1) · p · (1 - p)
        by_hand.append(-3 * (a - q) / (q * (1 - q)) * 0.6 * p * (1 - p))
    torch.testing.assert_close(logits.grad, torch.tensor([[by_hand]], dtype=torch.float64))


def test_the_estimates_of_all_samples_make_the_gradient_of_the_expected_reward():
    logits = torch.tensor([[[0.3, -0.7]]], dtype=torch.float64, requires_grad=True)
    rewards = {(0, 0): 1.0, (0, 1): -2.0, (1, 0): 5.0, (1, 1): 3.0}
    q = bound_probabilities(logits, 0.9)[0, 0]
    shares = {a: (q[0] if a[0] else 1 - q[0]) * (q[1] if a[1] else 1 - q[1]) for a in rewards}
    (expected,) = torch.autograd.grad(sum(shares[a] * reward for a, reward in rewards.items()), logits, retain_graph=True)
    estimate = torch.zeros_like(logits)
    for a in itertools.product((0, 1), repeat=2):
        advantage = torch.tensor([rewards[a] - 1.5], dtype=torch.float64)  # any baseline
        loss = policy_losses(logits, torch.tensor([[a]]).bool(), advantage, 0.9, 0.0)
        estimate -= shares[a].detach() * torch.autograd.grad(loss.sum(), logits)[0]
    torch.testing.assert_close(estimate, expected)


def test_entropy_draws_probabilities_to_a_half():
    logits = torch.tensor([[[2.0, -2.0]]], requires_grad=True)
    policy_losses(logits, torch.ones(1, 1, 2).bool(), torch.zeros(1), 0.8, 1.0).sum().backward()
    assert logits.grad[0, 0, 0] > 0 > logits.grad[0, 0, 1]  # a step against it lowers the first and raises the second
    assert not policy_losses(torch.full((1, 1, 2), 100.0), torch.zeros(1, 1, 2).bool(), torch.ones(1), 1.0, 1.0).isinf().any()


def test_the_reward_is_a_parabola_of_latency_for_correct_answers():
    window = Window(2.0, 6.0)
    latency = torch.tensor([2.0, 3.0, 4.0, 6.0, 7.0, 4.0])
    is_correct = torch.tensor([True, True, True, True, True, False])
    assert reward_images(is_correct, latency, window, 10.0, -3.0).tolist() == [0, 7.5, 10, 0, 0, -3]


def test_the_window_moves_from_most_modules_to_the_target():
    found = LatencyRange(least=1.0, reference=4.0, total=20.0)
    assert found.window(0.0, 0.5) == Window(1.0, 14.0)
    assert found.window(0.5, 0.5) == Window(1.0, 8.0)
    assert found.window(1.0, 0.5) == Window(1.0, 2.0)
    with pytest.raises(
        UsageError, match=r"--latency-target 0.25 is 1 ms, and what always runs takes 1 ms; use more than 0.250"
    ):
        found.check(0.25)
    found.check(0.26)


def test_phases_take_turns():
    phases = Phases(4, 4, 2)
    assert [phases.number(epoch) for epoch in range(10)] == [1] * 4 + [2] * 4 + [3] * 2
    assert [epoch for epoch in range(10) if phases.trains_controller(epoch)] == [4, 6]
    assert [phases.progress(epoch) for epoch in range(10)] == [0] * 6 + [1] * 4
    assert [phases.drop(epoch, 0.5) for epoch in range(4)] == [0, 0, 0.25, 0.5]
    assert [phases.name(epoch) for epoch in (0, 4, 5, 8)] == [
        "meta-graph",
        "search, controller",
        "search, meta-graph",
        "fine-tuning",
    ]


def test_the_rate_follows_the_phases():
    config = TrainConfig(model="instanas_cifar", epochs=10, search_epochs=4, tune_epochs=2, lr=1.0, search_lr=0.1, tune_lr=0.2)
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr_scale": 0.5}], lr=1.0)
    schedule = PhasedSchedule(optimizer, config, 100)
    rates = []
    for step in range(100):
        schedule.step_update(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert max(rates[:40]) == pytest.approx(0.5)
    assert rates[39] < 0.01
    assert rates[40:80] == [pytest.approx(0.05)] * 40
    assert rates[80] == pytest.approx(0.1)
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[99] < 0.002


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run through all phases, as a user types it. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("instanas") / "whole"
    assert main(["train", *as_words(options(data, folder))]) == 0
    return folder


def test_one_command_trains_all_phases(whole, capsys):
    rows = read_table(whole / "metrics.csv")
    assert [float(row["phase"]) for row in rows] == [1, 2, 2, 3, 3]
    assert all(np.isfinite(float(row[name])) for row in rows for name in ("train_loss", "val_latency_ms", "train_reward"))
    weights = load_checkpoint(whole).state_dict
    latency = read_latencies(whole / "latency.json", cells=2)
    assert torch.equal(weights["latency"], latency)
    assert yaml.safe_load((whole / "config.yaml").read_text())["search_epochs"] == 2
    found = float(rows[-1]["val_latency_ms"])
    assert 0 < found <= float(latency.sum()) * 1.0001
    best = torch.load(whole / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["epoch"] >= 3  # of the last phase only
    assert "top-1" in ask(capsys, "evaluate", whole)
    assert find_trade_off(load_checkpoint(whole)) == "latency target 0.9"  # its name in a comparison


@pytest.mark.slow
def test_a_run_can_be_analyzed(whole, tmp_path, capsys):
    ask(capsys, "analyze", whole, "--output", tmp_path / "figures")
    assert (tmp_path / "figures" / "explorer.html").exists()


def test_each_epoch_changes_what_its_phase_trains(data, whole, tmp_path, monkeypatch):
    states: dict[int, dict[str, Tensor]] = {}

    def keep(module: SearchClassifier) -> None:
        states[module.current_epoch] = {name: value.clone() for name, value in module.network.state_dict().items()}

    monkeypatch.setattr(SearchClassifier, "on_train_epoch_start", keep, raising=False)
    more = {"epochs": 4, "tune_epochs": 1, "latency_table": str(whole / "latency.json")}
    result = train(TrainConfig(**options(data, tmp_path / "run", **more)))
    states[4] = load_checkpoint(result.folder).state_dict
    for epoch, trains_controller in enumerate((False, True, False, False)):
        for name, before in states[epoch].items():
            may_change = name.startswith("controller.") == trains_controller and name != "latency"
            changed = not torch.equal(before, states[epoch + 1][name])
            assert changed <= may_change, (epoch, name)
            if may_change and name in ("controller.fc.weight", "conv1.weight"):
                assert changed, (epoch, name)


# Of 30 steps, one in each epoch but the last.
STEPS = [3, 8, 15, 20]


@pytest.mark.slow
def test_a_run_that_is_interrupted_in_every_phase_continues_exactly(data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("dgnet.training._prepare_search.measure_latencies", lambda *given: pytest.fail("measured again"))
    take_step, stops = SearchClassifier.training_step, iter(STEPS)
    stop = next(stops)

    def be_told_to_stop(module: SearchClassifier, *arguments: Any) -> Any:
        if module.global_step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(module, *arguments)

    monkeypatch.setattr(SearchClassifier, "training_step", be_told_to_stop)
    config = TrainConfig(**options(data, tmp_path / "run", latency_table=str(whole / "latency.json")))
    with pytest.raises(Interrupted):
        train(config)
    for next_stop in stops:
        stop = next_stop
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        with pytest.raises(Interrupted, match=f"after step {stop + 1}"):
            train(read_run(tmp_path / "run", {}, TrainConfig)[0], tmp_path / "run")
    stop = -1
    train(read_run(tmp_path / "run", {}, TrainConfig)[0], tmp_path / "run")
    assert_same(tmp_path / "run", whole)


def test_the_search_may_start_from_a_trained_meta_graph(data, whole, tmp_path):
    more = {"weights": str(whole), "epochs": 3, "tune_epochs": 1, "latency_target": 0.8}
    result = train(TrainConfig(**options(data, tmp_path / "run", latency_table=str(whole / "latency.json"), **more)))
    assert [row["phase"] for row in read_table(result.folder / "metrics.csv")] == ["2.0", "2.0", "3.0"]


@pytest.mark.slow
def test_the_controller_learns_to_be_fast_where_all_modules_are_right():
    """A controller trained on the reward alone, with answers that are always correct, leaves modules out."""
    torch.manual_seed(0)
    network = dgnet.create_model("instanas_cifar", num_classes=2, **TINY).train()
    network.latency.copy_(torch.tensor([[4.0, 3.0, 4.0, 3.0, 1.0]] * 2))
    window = Window(0.0, 16.0)  # about half of the first draws are rewarded
    optimizer = torch.optim.Adam(network.controller.parameters(), 0.02)
    images = torch.randn(16, 3, 8, 8)
    is_correct = torch.ones(16, dtype=torch.bool)
    for _ in range(150):
        logits = network.controller(images)
        opened = torch.rand_like(logits) < bound_probabilities(logits.detach(), 0.8)
        rewards = [
            reward_images(is_correct, network.estimate_latency(one), window, 10.0, -10.0) for one in (opened, logits >= 0)
        ]
        optimizer.zero_grad()
        policy_losses(logits, opened, rewards[0] - rewards[1], 0.8, 0.1).mean().backward()
        optimizer.step()
    latency = network.eval().estimate_latency(network.choose(images))
    assert latency.mean() < 0.5 * network.latency.sum()
    assert window.reward(latency).mean() > 0.3


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"search_epochs": 3}, "--search-epochs must be even, because a turn is two epochs, got 3"),
        ({"search_epochs": 4}, "--search-epochs 4 and --tune-epochs 2 leave -1 of --epochs 5; use fewer"),
        ({"tune_epochs": 3}, "leave 0 of --epochs 5, and the meta-graph needs some first, or trained --weights"),
        ({"search_epochs": 0}, "--tune-epochs 2 needs a search before it"),
        ({"budget": 0.5}, "--budget needs a network with dynamic stages whose blocks can get gates; instanas_cifar has none"),
        ({"precision": "fp16"}, "--precision fp16 is not possible for instanas_cifar, which has two optimisers; use bf16"),
        ({"layer_decay": 0.5}, "--layer-decay has no meaning for instanas_cifar"),
        ({"exploration": 0.4}, "--exploration must be"),
        ({"latency_target": -1}, "--latency-target must be"),
        ({"latency_table": "nothing.json"}, "nothing.json"),
        ({"warmup_epochs": 2.0}, "--warmup-epochs must be 0 to 1, got 2.0"),
        (
            {"model": "resnet20", "model_kwargs": {}},
            "needs a network with a controller, such as instanas_cifar, and resnet20 has none",
        ),
    ],
)
def test_bad_requests_are_refused_in_one_line(more, line, data, tmp_path, capsys):
    assert line in refuse(capsys, "train", *as_words(options(data, tmp_path / "run", **more)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"cells": []}, "has 0 cells, and the network 2 with the modules 3x3_e6, 3x3_e3, 5x5_e6, 5x5_e3, basic"),
        ({"cells": [{"3x3_e6": 1.0}] * 2}, "has 2 cells, and the network 2 with the modules"),
        ({"cells": 3}, "cells"),
        ({}, "cells"),
        (
            {"cells": [dict.fromkeys(("3x3_e6", "3x3_e3", "5x5_e6", "5x5_e3", "basic"), 0.0)] * 2},
            "holds a latency that is not above 0",
        ),
    ],
)
def test_a_bad_table_of_latencies_is_refused(content, line, tmp_path):
    (tmp_path / "latency.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=line):
        read_latencies(tmp_path / "latency.json", cells=2)


def test_the_module_writes_the_table_only_once(tmp_path):
    table = _search_module.LatencyTable(tmp_path, {"about": "first"})
    table.write(torch.ones(2, 5))
    _search_module.LatencyTable(tmp_path, {"about": "second"}).write(torch.zeros(2, 5))
    assert torch.equal(read_latencies(table.path, 2), torch.ones(2, 5))
