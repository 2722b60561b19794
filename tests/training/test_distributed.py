"""Several processes on one machine, over gloo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dgnet
from dgnet.files import read_table
from tests.helpers.processes import FORK, free_port, wait_for
from tests.helpers.runs import assert_same, options
from tests.helpers.static import build_static, use_gates

MODES = {"batch statistics": True, "running statistics": False}


def build(kind: str, is_training: bool) -> nn.Module:
    torch.manual_seed(0)
    if kind == "converted":
        network = dgnet.convert(build_static("resnet").double(), node_gate="hard", image_size=16)
        use_gates(network)
    else:
        network = dgnet.create_model("dg_resnet20", num_classes=5, channels=(4, 6, 8), node_gate="hard").double()
    for module in network.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train(is_training)
    return network


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 16, 16, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (8,), generator=generator)


def gradients(network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in network.named_parameters()}


def half_of_the_gradients(rank: int, port: int, kind: str, is_training: bool, path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images, labels = batch()
    network = DistributedDataParallel(build(kind, is_training), find_unused_parameters=False)
    found = gradients(network, images[rank::2], labels[rank::2])
    if rank == 0:
        torch.save(found, path)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dg_resnet20", "converted"])
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_give_the_mean_of_the_half_batches_gradients(mode, kind, tmp_path):
    is_training, port = MODES[mode], free_port()
    processes = [
        FORK.Process(target=half_of_the_gradients, args=(rank, port, kind, is_training, tmp_path / "gradients.pt"))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0, 0]
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    images, labels = batch()
    halves = [gradients(build(kind, is_training), images[rank::2], labels[rank::2]) for rank in range(2)]
    joined = gradients(build(kind, is_training), images, labels)
    assert found.keys() == joined.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=0, atol=1e-10)
        if not is_training:
            torch.testing.assert_close(gradient, joined[name], rtol=0, atol=1e-10)


def words(given: dict[str, object]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def torchrun(nodes: int, ranks: int, node: int, port: int, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One node's launcher, as a user starts it."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={ranks}"]
    command += [f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "dgnet", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


@pytest.mark.slow
def test_two_nodes_train_are_stopped_and_go_on(data, tmp_path):
    given = options(data, tmp_path / "run", epochs=30, checkpoint_every="1000 steps")
    log = tmp_path / "log"

    def start(arguments: list[str]) -> list[subprocess.Popen[bytes]]:
        port = free_port()
        return [torchrun(2, 1, node, port, arguments, log) for node in range(2)]

    nodes = start(words(given))
    wait_for(lambda: len(read_table(tmp_path / "run" / "metrics.csv")) >= 2, 300)
    nodes[1].send_signal(signal.SIGTERM)
    statuses = [node.wait(300) for node in nodes]
    assert all(statuses), log.read_text()
    rows = read_table(tmp_path / "run" / "metrics.csv")
    assert 2 <= len(rows) < 30
    nodes = start([f"--resume={tmp_path / 'run'}"])
    assert [node.wait(600) for node in nodes] == [0, 0], log.read_text()
    resumed = re.findall(r"30 epochs from step ([\d,]+) on", log.read_text())
    assert len(resumed) == 1
    assert int(resumed[0].replace(",", "")) > 0  # saved because of the signal
    assert [int(row["epoch"]) for row in read_table(tmp_path / "run" / "metrics.csv")] == list(range(30))


@pytest.mark.slow
def test_a_killed_rank_ends_the_job_and_it_goes_on(data, tmp_path):
    more = {"epochs": 16, "checkpoint_every": "7 steps"}
    log = tmp_path / "log"
    whole = torchrun(1, 2, 0, free_port(), words(options(data, tmp_path / "whole", **more)), log)
    assert whole.wait(600) == 0, log.read_text()
    job = torchrun(1, 2, 0, free_port(), words(options(data, tmp_path / "run", **more)), log)
    wait_for(lambda: len(read_table(tmp_path / "run" / "metrics.csv")) >= 2, 300)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    begin = time.monotonic()
    assert job.wait(300) != 0
    assert time.monotonic() - begin < 150
    job = torchrun(1, 2, 0, free_port(), [f"--resume={tmp_path / 'run'}"], log)
    assert job.wait(600) == 0, log.read_text()
    assert_same(tmp_path / "run", tmp_path / "whole", exact=False)
