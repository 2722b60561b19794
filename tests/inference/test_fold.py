from __future__ import annotations

import pytest
import torch
from torch import nn

import dgnet
from dgnet.inference import fold_batch_norms
from tests.helpers.networks import shake_norms

NETWORKS: dict[str, dict[str, object]] = {
    "resnet20": {},
    "dg_resnet20": {},
    "resnet18": {},
    "dg_resnet50": {},
    "dg_regnety_006": {},
    "dg_mobilenetv2_100": {},
    "dg_randwire_small": {"num_blocks": 7, "channels": 8, "head_channels": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_the_folded_network_is_the_same_function_without_normalisations(name):
    network = shake_norms(dgnet.create_model(name, num_classes=5, **NETWORKS[name])).eval()
    network, images = network.double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected = network(images)
    torch.testing.assert_close(folded(images), expected, rtol=1e-6, atol=1e-8 * expected.abs().max().item())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
