from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dgnet
from dgnet._cost_tables import TABLES, cost_rows, format_cost_table
from dgnet.errors import UsageError
from tests.helpers.networks import build_meta

ROOT = Path(__file__).parents[1]


def within(value: float, paper: float, unit: float, tolerance: float) -> bool:
    """The paper truncates as often as it rounds: one unit of its last digit is allowed before the tolerance."""
    return max(abs(value - paper) - unit, 0) <= tolerance * paper


RECORDED = {row["model"]: row for row in json.loads((ROOT / "docs" / "costs.json").read_text(encoding="utf-8"))}
BASELINES = {row.model for table in TABLES.values() for row in table.rows}


def test_every_model_has_a_record():
    assert set(RECORDED) >= {*dgnet.list_models(), *BASELINES}


NAMES = sorted({*dgnet.list_models(), *BASELINES})
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


@pytest.mark.parametrize("name", NAMES)
def test_the_record_is_what_is_counted(name):
    model = build_meta(name)
    size = model.pretrained_cfg["input_size"][1:]
    recorded = RECORDED[name]
    assert recorded["image_size"] == list(size), "run: make costs"
    (printed,) = [row for row in TABLES["1"].rows if row.model == name] or [None]
    assert recorded["paper_params"] == (printed and printed.params), "run: make costs"
    assert recorded["paper_multiply_adds"] == (printed and printed.multiply_adds), "run: make costs"
    assert {**recorded, **asdict(dgnet.cost(model, size))} == recorded, "run: make costs"


@pytest.mark.parametrize("name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_torchs_own_counter_agrees_with_the_record(name):
    """FlopCounterMode counts two for each multiply-add, of convolutions and matrix products."""
    model, recorded = build_meta(name), RECORDED[name]
    counter = FlopCounterMode(display=False)
    with counter:
        model.eval()(torch.empty(1, 3, *recorded["image_size"], device="meta"))
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    assert counts["aten.convolution"] == 2 * recorded["multiply_adds"]
    matrix_products = sum(counts.values()) - counts["aten.convolution"]
    assert matrix_products == 2 * (recorded["router_multiply_adds"] + model.get_classifier().weight.numel())


@pytest.mark.parametrize("row", TABLES["1"].rows, ids=lambda row: row.model)
def test_table_1(row):
    recorded = RECORDED[row.model]
    assert within(recorded["multiply_adds"] / 1e6, row.multiply_adds_m, 1, 0.0025)
    assert within(recorded["params"] / 1e6, row.params_m, 0.01, 0.0015)


@pytest.mark.parametrize("row", TABLES["2"].rows, ids=lambda row: row.model)
def test_table_2(row):
    cost = dgnet.cost(build_meta(row.model), TABLES["2"].image_size)
    assert 2 * cost.multiply_adds / 1e9 == pytest.approx(row.gflops, rel=0.01)


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


def test_the_readmes_table_is_that_of_the_record():
    rows = [RECORDED[row.model] for row in TABLES["1"].rows]
    assert format_cost_table(rows, markdown=True) in (ROOT / "README.md").read_text(encoding="utf-8")
