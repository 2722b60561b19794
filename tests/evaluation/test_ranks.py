"""Several processes evaluate as one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dgnet.evaluation import evaluate
from dgnet.models.cifar_resnet import DynamicCifarResNet
from tests.helpers.data import Images
from tests.helpers.networks import close_some, spread_routers
from tests.helpers.processes import FORK, free_port


def evaluate_seven() -> dict[str, object]:
    torch.manual_seed(0)
    network = DynamicCifarResNet((2, 2, 2), channels=(4, 6, 8), num_classes=5, node_gate="hard", node_gate_bias=0.3)
    for stage in network.stages:
        spread_routers(stage)
    images = torch.randn(7, 3, 12, 10)
    close_some(network, images)
    return asdict(evaluate(network, Images(images, [0, 1, 2, 3, 4, 0, 1]), batch_size=2, adjacency_controls=True))


def evaluate_one() -> dict[str, object]:
    torch.manual_seed(0)
    return asdict(evaluate(DynamicCifarResNet((1, 1, 1), num_classes=5), Images(torch.randn(1, 3, 8, 8), [2])))


def evaluate_part(rank: int, port: int, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save((evaluate_seven(), evaluate_one()), output / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_have_the_figures_of_one(tmp_path):
    port = free_port()
    processes = [FORK.Process(target=evaluate_part, args=(rank, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    expected = evaluate_seven(), evaluate_one()
    assert expected[0]["closed_edges"] > 0
    assert expected[0]["weight_std"] > 0.01
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for figures, alone in zip(found, expected, strict=True):
            for name, value in figures.items():
                if name == "top1_other_adjacency":  # which image comes before another depends on how they are divided
                    assert (value is None) == (alone[name] is None)
                elif isinstance(value, float | dict):
                    assert value == pytest.approx(alone[name], rel=1e-5), name
                else:
                    assert value == alone[name], name
