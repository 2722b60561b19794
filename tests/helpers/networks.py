"""Small networks whose connectivity differs from sample to sample."""

from __future__ import annotations

import torch
from torch import nn

from dgnet.graph import DynamicGraph, RoutedWeighting, find_stages, record_connectivity


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
