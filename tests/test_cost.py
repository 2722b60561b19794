from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dgnet
from dgnet.errors import UsageError
from dgnet.tables import TABLE_1, cost_rows, format_cost_table


def within(value: float, paper: float, unit: float, tolerance: float) -> bool:
    """The paper truncates as often as it rounds: one unit of its last digit is allowed before the tolerance."""
    return max(abs(value - paper) - unit, 0) <= tolerance * paper


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name):
    cost = dgnet.cost(dgnet.create_model(name))
    assert within(cost.multiply_adds / 1e6, TABLE_1[name].multiply_adds_m, 1, 0.0025)
    assert within(cost.params / 1e6, TABLE_1[name].params_m, 0.01, 0.0015)


@pytest.mark.parametrize("name", ["dg_resnet18", "dg_resnet50", "dg_resnet20", "resnet20"])
def test_torchs_own_counter_agrees(name):
    """FlopCounterMode counts two for each multiply-add, of convolutions and matrix products."""
    model = dgnet.create_model(name)
    size = model.pretrained_cfg["input_size"][1:]
    cost = dgnet.cost(model, size)
    counter = FlopCounterMode(display=False)
    with counter:
        model.to("meta").eval()(torch.empty(1, 3, *size, device="meta"))
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.convolution"] == 2 * cost.multiply_adds
    matrix_products = sum(counts.values()) - counts["aten.convolution"]
    assert matrix_products == 2 * (cost.router_multiply_adds + model.fc.weight.numel())


def test_router_and_aggregation_counts_by_hand():
    """dg_resnet20: 5 nodes a stage, so 10 edges, of which the entry node's reads the raw stage input."""
    cost = dgnet.cost(dgnet.create_model("dg_resnet20"), 32)
    edges = [4 + 3 + 2 + 1] * 3
    assert cost.router_multiply_adds == sum(c * e for c, e in zip((16, 32, 64), edges, strict=True))
    maps = [16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8]
    raw = [16 * 32 * 32, 16 * 32 * 32, 32 * 16 * 16]
    assert cost.aggregation_multiply_adds == sum(9 * m + r for m, r in zip(maps, raw, strict=True))


def test_counting_leaves_the_model_as_it_was():
    model = dgnet.create_model("dg_resnet20")
    dgnet.cost(model, 32)
    assert next(model.parameters()).device.type == "cpu"
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_size_that_makes_no_sense():
    with pytest.raises(UsageError, match="at least 1 pixel, got 0×32"):
        dgnet.cost(dgnet.create_model("dg_resnet20"), (0, 32))


def test_the_printed_table_shows_the_papers_figures():
    text = format_cost_table(cost_rows(["resnet18", "dg_resnet18"]))
    assert "1826.41" in text
    assert "1826 " in text
    assert "+0.02 %" in text
    assert "1826 " not in format_cost_table(cost_rows(["dg_resnet18"], (64, 64)))
