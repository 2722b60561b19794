from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.utils.data import _utils

from dgnet.graph import find_aggregation, find_stages
from dgnet.models.cifar_resnet import DynamicCifarResNet
from tests.helpers.networks import spread_routers

# Each worker of pytest-xdist, and each process that a test starts, computes on one thread.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# How long a worker of a DataLoader may wait for an index before it looks whether its loader is gone. A loader whose worker
# raised an error is freed by the garbage collector, after its queues; with torch's five seconds tests would idle.
_utils.MP_STATUS_CHECK_INTERVAL = _utils.worker.MP_STATUS_CHECK_INTERVAL = 0.5

settings.register_profile("fast", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=300, deadline=None)  # make test-slow
settings.load_profile("fast")


@pytest.fixture(autouse=True, scope="session")
def _aggregation() -> None:
    """Build the extension of aggregation before the first test, so that no test's output has the line about it."""
    find_aggregation("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> Callable[..., DynamicCifarResNet]:
    """A network of three stages with three blocks each, quick to run; its routers differ between samples."""

    def build(**kwargs: object) -> DynamicCifarResNet:
        options = {"layers": (3, 3, 3), "channels": (4, 6, 8), "num_classes": 5, "zero_init_last": False}
        network = DynamicCifarResNet(**{**options, **kwargs})
        for stage in find_stages(network):
            spread_routers(stage)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # as after training: f_j(0) is not 0
                nn.init.normal_(module.bias, std=0.2)
                nn.init.normal_(module.running_mean, std=0.2)
        return network

    return build
