"""The gate of benchmarks/: its decision, its file of bounds, and its exit status. Nothing is measured here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gate

GOOD = {name: 10.0 if "least" in entry else 0.01 for name, entry in json.loads(gate.BASELINE.read_text())["ratios"].items()}
"""Ratios that keep any sensible bound."""


def fake(values):
    return {name: lambda name=name: {name: values[name]} for name in values}


@pytest.fixture
def baseline(tmp_path):
    """A copy of the bounds, and a function that changes it."""
    path = tmp_path / "baseline.json"
    content = json.loads(gate.BASELINE.read_text(encoding="utf-8"))

    def change(**entries):
        content["ratios"] |= entries
        path.write_text(json.dumps(content), encoding="utf-8")
        return path

    change()
    return change


def run(capsys, path, values, *words):
    status = gate.main(["--baseline", str(path), *words], fake(values))
    return status, capsys.readouterr()


def test_every_ratio_has_a_bound_and_a_measurement():
    assert set(gate.read_baseline(gate.BASELINE)["ratios"]) == set(gate.WHAT) == set(gate.MEASURES) == set(GOOD)


def test_good_ratios_pass(capsys, baseline):
    status, (output, _) = run(capsys, baseline(), GOOD)
    assert status == 0
    assert "BEYOND" not in output
    assert output.splitlines()[-1] == "all ratios are within their bounds"
    assert output.count("| within |") == len(GOOD)


@pytest.mark.parametrize(("bound", "value", "is_within"), [("least", 0.5, True), ("least", 0.499, False), ("most", 0.5, True),
                                                           ("most", 0.501, False), ("least", float("nan"), False),
                                                           ("most", float("nan"), False), ("most", 0.0, True)])  # fmt: skip
def test_the_bound_decides(capsys, baseline, bound, value, is_within):
    status, (output, _) = run(capsys, baseline(train_step={bound: 0.5}), GOOD | {"train_step": value})
    assert status == (0 if is_within else 1)
    assert ("beyond the bound: train_step" in output) == (not is_within)


def test_all_that_are_beyond_are_named(capsys, baseline):
    status, (output, _) = run(capsys, baseline(), GOOD | {"aggregate_eager": 0.0, "train_memory": 99.0})
    assert status == 1
    assert output.splitlines()[-1] == "beyond the bound: aggregate_eager, train_memory"


def test_some_can_be_chosen(capsys, baseline):
    status, (output, _) = run(capsys, baseline(), {"sparse_batch8": 0.0}, "--only", "sparse_batch8")
    assert status == 1
    assert output.count("\n| ") == 1


def test_one_measurement_may_give_several_ratios():
    calls = []

    def both():
        calls.append(1)
        return {"train_step": 1.0, "train_memory": 1.1}

    values = gate.measure(["train_step", "train_memory"], {"train_step": both, "train_memory": both})
    assert values == {"train_step": 1.0, "train_memory": 1.1}
    assert calls == [1]


def test_recording_keeps_the_bounds(capsys, baseline):
    path = baseline(train_step={"most": 1.25})
    status, _ = run(capsys, path, GOOD | {"train_step": 1.23456}, "--record")
    assert status == 0
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["ratios"]["train_step"] == {"most": 1.25, "measured": 1.235}
    assert content["hardware"]
    assert content["versions"]["torch"]
    _, (output, _) = run(capsys, path, GOOD)
    assert "| train_step | 0.010 | at most 1.25 | 1.235 | within |" in output


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "train_step must have `least` or `most`"),
        ({"least": 1, "most": 2}, "train_step must have `least` or `most`"),
        ({"mots": 2}, "train_step must have `least` or `most`"),
        (5, "train_step must have `least` or `most`"),
        ({"most": "2"}, "most must be a number, got '2'"),
        ({"most": -1}, "most must be at least 0, got -1"),
        ({"most": 2, "measured": "fast"}, "measured must be a number, got 'fast'"),
    ],
)
def test_bounds_that_are_wrong_are_named(capsys, baseline, entry, message):
    status, (output, errors) = run(capsys, baseline(train_step=entry), GOOD)
    assert (status, output) == (2, "")
    assert message in errors
    assert errors.startswith("gate.py: ")
    assert errors.count("\n") == 1


def test_a_ratio_without_bound_and_other_mistakes(capsys, baseline, tmp_path):
    path = baseline(train_speed={"most": 1})
    assert run(capsys, path, GOOD)[0] == 2
    assert run(capsys, tmp_path / "nowhere.json", GOOD)[0] == 2
    status, (_, errors) = run(capsys, path, GOOD, "--only", "sparse_batch9")
    assert status == 2
    assert "unknown --only 'sparse_batch9'; did you mean 'sparse_batch" in errors
