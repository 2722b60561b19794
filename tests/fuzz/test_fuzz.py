"""Random inputs, and kept ones that were once answered badly, run through the whole command. `make fuzz` runs many more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import hypothesis.core
import pytest

from tests.fuzz.campaign import Fuzzer, generate, read_kept
from tests.fuzz.inputs import KINDS, commands
from tests.fuzz.judge import Input, judge
from tests.fuzz.worker import Outcome

EACH = 3
"""Random inputs of each kind."""


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    made = Fuzzer()
    yield made
    made.close()


def find_all(fuzzer: Fuzzer, inputs: list[Input]) -> list[str]:
    return [f"{fault.name}: {fault.detail}\n  {given}" for given in inputs for fault in fuzzer.find_faults(given)]


@pytest.mark.slow
def test_random_inputs_are_answered_in_one_line(fuzzer, request, monkeypatch):
    start = request.config.getoption("--hypothesis-seed") or 0
    monkeypatch.setattr(hypothesis.core, "global_force_seed", None)  # `start` decides, and each input differs
    inputs = [given for kind in KINDS for given in generate(kind, EACH, start)]
    faults = find_all(fuzzer, inputs)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
@pytest.mark.parametrize("name", read_kept())
def test_kept_inputs_are_answered_in_one_line(fuzzer, name):
    faults = find_all(fuzzer, read_kept()[name])
    assert not faults, "\n".join(faults)


def test_the_same_seed_gives_the_same_inputs():
    assert list(generate("command", 3, 5)) == list(generate("command", 3, 5))


def test_each_command_is_tried():
    assert {"train", "evaluate", "detect evaluate", "bench", "models"} <= commands().keys()
    assert "--lr" in commands()["train"]


def test_the_judge_sees_what_is_wrong():
    given = Input("run", ["evaluate", "@run@", "--json"], [["set_yaml", "run/config.yaml", "lr", "1"]])
    fine = Outcome(0, None, False, False, 0.1, '{"top1": 1}\n', "")
    assert judge(given, fine, fine) == []
    assert "another result" in judge(given, replace(fine, stdout='{"top1": 2}\n'), fine)[0].name
    assert judge(given, replace(fine, stdout='{"top1": 2}\n', stderr="config.yaml: lr is 1 now\n"), fine) == []
    assert (
        "traceback"
        in judge(given, replace(fine, status=1, stderr="Traceback (most recent call last):\nKeyError\n"), None)[0].name
    )
    assert "hangs" in judge(given, replace(fine, hangs=True), None)[0].name
    assert "signal" in judge(given, replace(fine, signal=11), None)[0].name
    assert "0 lines" in judge(given, replace(fine, status=2), None)[0].name
    assert "wording" in judge(given, replace(fine, status=2, stderr="dgnet: NoneType has no attribute x\n"), None)[0].name
