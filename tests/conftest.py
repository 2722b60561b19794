from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dgnet.graph import DynamicGraph, RoutedWeighting, find_stages, record_connectivity
from dgnet.models.cifar_resnet import DynamicCifarResNet

# Lie beside the checkout, not in it.
SHARED_DATA = Path(os.environ.get("DGNET_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


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


def spread_routers(stage: DynamicGraph, std: float = 2.0) -> None:
    """Move routers away from their start, so that α differs from edge to edge and sample to sample."""
    if isinstance(stage.weighting, RoutedWeighting):
        for router in stage.weighting.routers.values():
            if not isinstance(router, nn.Linear):
                continue
            nn.init.normal_(router.weight, std=std)
            nn.init.normal_(router.bias, mean=0.5)
    if stage.node_gates is not None:
        for column in stage.node_gates.columns.values():
            nn.init.normal_(column.weight, std=std)


def close_some(network: nn.Module, images: torch.Tensor) -> None:
    """Set τ so that many edges close; each τ lies in the middle of a wide gap between values of α."""
    network.eval()
    for index, stage in enumerate(find_stages(network)):
        for node in range(1, stage.topology.num_nodes):
            # Run again for each node: what it closes changes the nodes behind it.
            with torch.no_grad(), record_connectivity(network) as record:
                network(images)
            alpha = record.alpha[index][:, node, list(stage.topology.senders(node))].flatten().sort().values
            quarter = len(alpha) // 4
            gap = quarter + int(alpha.diff()[quarter : len(alpha) - quarter].argmax())
            is_wide = alpha[gap + 1] - alpha[gap] > 2e-3  # not so where a sender is dead for all samples
            with torch.no_grad():
                stage.weighting.tau[node] = (alpha[gap] + alpha[gap + 1]) / 2 if is_wide else -1
