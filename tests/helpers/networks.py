"""Small networks whose connectivity differs from sample to sample."""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn

import dgnet
from dgnet.graph import DynamicGraph, RoutedWeighting, find_stages, record_connectivity
from dgnet.inference import export_network

FAMILIES: dict[str, dict[str, object]] = {
    "dg_resnet18": {},
    "dg_resnet20": {},
    "dg_mobilenetv2_100": {},
    "dg_regnety_006": {},
    "dg_randwire_small": {"num_blocks": 7, "channels": 8, "head_channels": 16},
}
"""A network of each family, with the options that make it small."""


def build(name: str, **options: object) -> nn.Module:
    """`dgnet.create_model`, always with the same weights. The network is built once; this returns a copy."""
    return copy.deepcopy(_build(name, tuple(sorted(options.items()))))


@cache
def _build(name: str, options: tuple[tuple[str, object], ...]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return dgnet.create_model(name, **dict(options))


def build_meta(name: str, **options: object) -> nn.Module:
    """A network on the meta device, for tests of shapes and names: its weights have no values."""
    if "regnet" in name:  # torch 2.11 cannot draw timm's widths there
        return dgnet.create_model(name, **options).to("meta")
    with torch.device("meta"):
        return dgnet.create_model(name, **options)


def shake_norms(network: nn.Module) -> nn.Module:
    """Normalisations as after training: no path is silent, and what they make of zeros is not zero."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network


def spread_routers(stage: DynamicGraph, std: float = 2.0) -> None:
    """Draw new router weights, so that α differs between edges and between samples."""
    if isinstance(stage.weighting, RoutedWeighting):
        for router in stage.weighting.routers.values():
            if not isinstance(router, nn.Linear):
                continue
            nn.init.normal_(router.weight, std=std)
            nn.init.normal_(router.bias, mean=0.5)
    if stage.node_gates is not None:
        for reader in stage.node_gates.readers:
            nn.init.normal_(reader.weight, std=std)


def close_some(network: nn.Module, images: torch.Tensor) -> None:
    """Set τ so that many edges close. Each τ is in the middle of a wide gap between values of α, or -1 if there is none."""
    network.eval()
    for index, stage in enumerate(find_stages(network)):
        for node in range(1, stage.topology.num_nodes):
            # Run again for each node: the edges that it closes change the nodes after it.
            with torch.no_grad(), record_connectivity(network) as record:
                network(images)
            alpha = record.alpha[index][:, node, list(stage.topology.senders(node))].flatten().sort().values
            quarter = len(alpha) // 4
            gap = quarter + int(alpha.diff()[quarter : len(alpha) - quarter].argmax())
            is_wide = alpha[gap + 1] - alpha[gap] > 2e-3  # False if a sender is dead for all samples
            with torch.no_grad():
                stage.weighting.tau[node] = (alpha[gap] + alpha[gap + 1]) / 2 if is_wide else -1


def draw_and_close(network: nn.Module) -> nn.Module:
    """Draw routers, gates and normalisations, and set thresholds that close some edges of any weighting."""
    for stage in find_stages(network):
        for name, parameter in stage.named_parameters():
            if "routers" in name or "columns" in name:
                nn.init.normal_(parameter, std=1.5)
        nn.init.constant_(stage.weighting.tau, 0.35)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
    return network.eval()


@torch.no_grad()
def assert_forms_agree(network: nn.Module) -> None:
    """The exported programs and the compiled graph give what the network gives."""
    images = torch.randn(2, 3, 16, 16)
    expected = network(images)
    for mode in ("dense", "sparse"):
        program = export_network(network, (16, 16), mode)
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def close_some_gates(network: nn.Module, images: torch.Tensor) -> None:
    """Set the bias of each block gate so that it is open for some of `images`: in the middle of a wide gap between logits."""
    network.eval()
    for stage in find_stages(network):
        gates, decide = stage.node_gates, stage.node_gates.decide

        def adjust(node: int, votes: torch.Tensor, offset: float = 0.0, gates=gates, decide=decide) -> torch.Tensor:
            logits = votes.sum(1).sort().values
            quarter = len(logits) // 4
            gap = quarter + int(logits.diff()[quarter : len(logits) - quarter].argmax())
            gates.bias[node] = -(logits[gap] + logits[gap + 1]) / 2
            return decide(node, votes, offset)

        gates.decide = adjust
    with torch.no_grad():
        network(images)
    for stage in find_stages(network):
        del stage.node_gates.decide
