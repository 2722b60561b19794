from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dgnet
from dgnet._cost import cost_model
from dgnet._cost_tables import TABLES, cost_rows, format_cost_table
from dgnet.errors import UsageError
from dgnet.graph import find_stages
from tests.helpers.networks import build_meta
from tests.helpers.pairs import slow_unless

ROOT = Path(__file__).parents[1]


def within(value: float, paper: float, unit: float, tolerance: float) -> bool:
    """The paper truncates as often as it rounds: one unit of its last digit is allowed before the tolerance."""
    return max(abs(value - paper) - unit, 0) <= tolerance * paper


RECORDED = {row["model"]: row for row in json.loads((ROOT / "docs" / "costs.json").read_text(encoding="utf-8"))}
BASELINES = {row.model for table in TABLES.values() for row in table.rows}


def test_every_model_has_a_record():
    assert set(RECORDED) >= {*dgnet.list_models(), *BASELINES}


NAMES = sorted({*dgnet.list_models(), *BASELINES})
SLOW = re.compile("randwire|instanas|110|101")
"""Networks that take a second or more to count."""
# One a family.
FAMILIES = {
    "dg_resnet18",
    "dg_resnet20",
    "dg_mobilenetv2_100",
    "dg_regnety_006",
    "randwire_small_er",
    "resnet50",
    "regnetx_016",
}


@pytest.mark.parametrize("name", slow_unless(lambda name: not SLOW.search(name), NAMES))
def test_the_record_is_what_is_counted(name):
    model = build_meta(name)
    size = model.pretrained_cfg["input_size"][1:]
    recorded = RECORDED[name]
    assert recorded["image_size"] == list(size), "run: make costs"
    (printed,) = [row for row in TABLES["1"].rows if row.model == name] or [None]
    assert recorded["paper_params"] == (printed and printed.params), "run: make costs"
    assert recorded["paper_multiply_adds"] == (printed and printed.multiply_adds), "run: make costs"
    assert {**recorded, **asdict(dgnet.cost(model, size))} == recorded, "run: make costs"


def count_by_module(model: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """The slow twin for networks of convolutions and `nn.Linear` that keep the batch: from shapes of modules and outputs."""
    counts = {"multiply_adds": 0, "linear_multiply_adds": 0, "router_multiply_adds": 0}
    deciders = [module for stage in find_stages(model) for module in (stage.weighting, stage.node_gates) if module is not None]
    routing = {layer for decider in deciders for layer in decider.modules()}

    def count(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
        kind = "multiply_adds" if isinstance(layer, nn.Conv1d | nn.Conv2d) else "linear_multiply_adds"
        counts["router_multiply_adds" if layer in routing else kind] += output.numel() * layer.weight[0].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, *size, device="meta"))
    return counts


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_count_from_the_modules_agrees_with_the_record(name):
    recorded = RECORDED[name]
    counts = count_by_module(build_meta(name), recorded["image_size"])
    assert counts == {kind: recorded[kind] for kind in counts}


# From the papers' descriptions: (multiply-adds of convolutions, of matrix products) at 224 pixels, 1,000 classes.


def resnet18() -> tuple[int, int]:
    total, before = 112**2 * 7 * 7 * 3 * 64, 64
    for side, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
        total += side**2 * 9 * (before * channels + 3 * channels**2)
        total += side**2 * before * channels * (before != channels)  # the projection
        before = channels
    return total, 512 * 1000


def convnext_tiny() -> tuple[int, int]:
    convolutions, products, before = 56**2 * 48 * 96, 768 * 1000, 96
    for side, depth, channels in ((56, 3, 96), (28, 3, 192), (14, 9, 384), (7, 3, 768)):
        convolutions += side**2 * 4 * before * channels * (before != channels)
        convolutions += depth * side**2 * 49 * channels
        products += depth * side**2 * 8 * channels**2
        before = channels
    return convolutions, products


def efficientnet_b0() -> tuple[int, int]:
    total, before = 112**2 * 27 * 32 + 49 * 320 * 1280, 32
    stages = (
        (1, 16, 1, 112, 3),  # expansion, channels, blocks, side, kernel
        (6, 24, 2, 56, 3),
        (6, 40, 2, 28, 5),
        (6, 80, 3, 14, 3),
        (6, 112, 3, 14, 5),
        (6, 192, 4, 7, 5),
        (6, 320, 1, 7, 3),
    )
    side_before = 112
    for expansion, channels, blocks, side, kernel in stages:
        for _ in range(blocks):
            wide = expansion * before
            total += side_before**2 * before * wide * (expansion > 1)
            total += side**2 * kernel**2 * wide + 2 * wide * (before // 4) + side**2 * wide * channels
            before, side_before = channels, side
    return total, 1280 * 1000


def vit_tiny_patch16_224() -> tuple[int, int]:
    patches, width = 14**2, 192
    tokens = patches + 1
    return patches * 16 * 16 * 3 * width, 12 * (12 * tokens * width**2 + 2 * tokens**2 * width) + width * 1000


def swin_tiny_patch4_window7_224() -> tuple[int, int]:
    products = 768 * 1000
    for stage, depth in enumerate((2, 2, 6, 2)):
        tokens, width = (56 // 2**stage) ** 2, 96 * 2**stage
        products += depth * (12 * tokens * width**2 + 2 * tokens * 49 * width)
        products += tokens * 2 * width * width * (stage > 0)  # merging: four tokens of half the width become one
    return 56**2 * 48 * 96, products


@pytest.mark.parametrize(
    "by_hand", [resnet18, convnext_tiny, efficientnet_b0, vit_tiny_patch16_224, swin_tiny_patch4_window7_224]
)
def test_a_familys_formula_gives_what_is_counted(by_hand):
    model = build_meta(by_hand.__name__)
    cost = dgnet.cost(model, 224)
    assert (cost.multiply_adds, cost.linear_multiply_adds) == by_hand()
    assert cost_model(model, 224).dense == sum(by_hand())


@pytest.mark.parametrize("row", TABLES["1"].rows, ids=lambda row: row.model)
def test_table_1(row):
    recorded = RECORDED[row.model]
    assert within(recorded["multiply_adds"] / 1e6, row.multiply_adds_m, 1, 0.0025)
    assert within(recorded["params"] / 1e6, row.params_m, 0.01, 0.0015)


@pytest.mark.parametrize("row", TABLES["2"].rows, ids=lambda row: row.model)
def test_table_2(row):
    cost = dgnet.cost(build_meta(row.model), TABLES["2"].image_size)
    assert 2 * cost.multiply_adds / 1e9 == pytest.approx(row.gflops, rel=0.01)


@pytest.mark.slow
def test_table_4():
    assert RECORDED["dg_randwire_small"]["multiply_adds"] / 1e6 == pytest.approx(611, rel=0.005)
    # Mean and standard deviation over 30 graphs, as worked out from the generators; BA has one source whatever the seed.
    for name, mean, deviation in (("er", 583.6, 7.5), ("ba", 602.4, 0.03), ("ws", 578.0, 7.9)):
        counts = []
        for seed in range(3):
            model = build_meta(f"randwire_small_{name}", topology_seed=seed)
            counts.append(dgnet.cost(model).multiply_adds / 1e6)
        assert abs(sum(counts) / 3 - mean) < 2 * deviation / 3**0.5, counts
        assert all(abs(count - mean) < 3 * deviation for count in counts), counts


@pytest.mark.parametrize("name", ["dg_regnetx_006", "dg_regnety_006"])
def test_table_5(name):
    assert RECORDED[name]["multiply_adds"] / 1e6 == pytest.approx(601, rel=0.005)


def test_router_and_aggregation_counts_by_hand():
    """dg_resnet20: 5 nodes a stage, so 10 edges, of which the entry node's reads the raw stage input."""
    cost = dgnet.cost(dgnet.create_model("dg_resnet20"), 32)
    edges = [4 + 3 + 2 + 1] * 3
    assert cost.router_multiply_adds == sum(c * e for c, e in zip((16, 32, 64), edges, strict=True))
    maps = [16 * 32 * 32, 32 * 16 * 16, 64 * 8 * 8]
    raw = [16 * 32 * 32, 16 * 32 * 32, 32 * 16 * 16]
    assert cost.aggregation_multiply_adds == sum(9 * m + r for m, r in zip(maps, raw, strict=True))


def test_with_the_shortcut_in_the_node_an_entry_nodes_is_weighed_too():
    edge, node = (dgnet.cost(dgnet.create_model("dg_resnet20", shortcut=kind), 32) for kind in ("edge", "node"))
    assert node.aggregation_multiply_adds - edge.aggregation_multiply_adds == 16 * 32 * 32 + 32 * 16 * 16 + 64 * 8 * 8


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
    rows = cost_rows(["resnet18", "dg_resnet18"])
    text = format_cost_table(rows)
    assert "1826.41" in text
    assert "1826 " in text
    assert "+0.02 %" in text
    assert rows[1]["paper_multiply_adds"] == 1826e6
    elsewhere = cost_rows(["dg_resnet18"], (64, 64))
    assert "1826 " not in format_cost_table(elsewhere)
    assert elsewhere[0]["paper_params"] is None


def test_any_timm_network_is_in_the_table():
    rows = cost_rows(["vit_tiny_patch16_224", "convnext_atto"])
    assert [row["linear_multiply_adds"] for row in rows] == [vit_tiny_patch16_224()[1], 320 * 1000]
    text = format_cost_table(rows)
    assert " linear M " in text
    assert f" {vit_tiny_patch16_224()[1] / 1e6:.2f} " in text
    assert "| linear M |" in format_cost_table(rows, markdown=True)


def test_the_count_does_not_depend_on_the_callers_modes():
    model = dgnet.create_model("resnet18")
    expected = dgnet.cost(model, 64)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert dgnet.cost(model, 64) == expected
    assert dgnet.cost(model.bfloat16(), 64) == expected


def test_a_table_of_the_paper_names_its_models_and_size(monkeypatch):
    monkeypatch.setitem(TABLES, "2", replace(TABLES["2"], rows=TABLES["2"].rows[:1]))
    (row,) = cost_rows(table="2")
    assert (row["model"], row["image_size"]) == ("resnet50", [800, 1333])
    assert row["paper_multiply_adds"] == 87e9
    assert " 174.7 " in format_cost_table([row], "2")
    with pytest.raises(UsageError, match="unknown --table '3'; allowed: 1, 2, 4, 5"):
        cost_rows(table="3")
    with pytest.raises(UsageError, match="--table 2 has its own list of models; leave out resnet18"):
        cost_rows(["resnet18"], table="2")


@pytest.mark.slow
def test_the_record_of_the_detection_backbones_is_what_is_counted():
    recorded = json.loads((ROOT / "docs" / "costs_detection.json").read_text(encoding="utf-8"))
    assert recorded == cost_rows(table="2"), "run: make costs"
