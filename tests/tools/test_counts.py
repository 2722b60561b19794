"""Counts of other people's counters against `dgnet.cost`."""

from __future__ import annotations

import pytest
from torch import nn

import dgnet
from tests.helpers.tools import require, run_page

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tools


def test_torchinfo_and_fvcore(routed):
    require("torchinfo")
    require("fvcore.nn")
    for network in (dgnet.create_model("dg_resnet20", num_classes=10), routed):
        scope = run_page("torchinfo and fvcore", model=network)
        cost = dgnet.cost(network, 32)
        products = cost.linear_multiply_adds + cost.router_multiply_adds
        operators = scope["flops"].by_operator()
        assert operators["conv"] == cost.multiply_adds
        assert operators["linear"] == products
        norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        linear = [m for m in network.modules() if isinstance(m, nn.Linear) and m.bias is not None]
        own = sum(2 * m.num_features for m in norms) + sum(m.out_features for m in linear)  # torchinfo: one for each parameter
        assert scope["table"].total_mult_adds == cost.multiply_adds + products + own
        assert scope["table"].total_params == cost.params
