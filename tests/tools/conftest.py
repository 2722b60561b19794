"""An empty folder for each test, images to train on, and a network whose paths differ between images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dgnet
from dgnet.graph import find_stages
from tests.helpers.data import write_folder
from tests.helpers.networks import close_some_gates, shake_norms, spread_routers


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch) -> None:
    """Blocks of the page write to the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """A divided folder of two classes."""
    for split in ("train", "val"):
        write_folder(tmp_path / "photos" / split, {"a": 6, "b": 6})
    return tmp_path / "photos"


@pytest.fixture
def routed() -> nn.Module:
    """dg_resnet20 as after training: edges and blocks are closed, and not the same for all images."""
    network = shake_norms(dgnet.create_model("dg_resnet20", num_classes=10, node_gate="hard"))
    for stage in find_stages(network):
        spread_routers(stage)
    close_some_gates(network, torch.randn(16, 3, 32, 32))
    return network
