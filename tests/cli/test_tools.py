"""What `dgnet` itself, `models` and `cost` print."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import dgnet
from dgnet._cost_tables import TABLES
from dgnet.cli import main
from tests.helpers.command import ask


def test_models(capsys):
    names = ask(capsys, "models").split()
    assert names == dgnet.list_models()
    assert "dg_resnet50" in names


def test_version_and_help(capsys):
    for arguments, expected in (
        (["--version"], f"dgnet {dgnet.__version__}"),
        (["--help"], "evaluate"),
        (["train", "--help"], "--val-data"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert expected in capsys.readouterr().out
    assert main([]) == 2


@pytest.mark.slow
def test_a_reader_that_has_enough_is_no_traceback():
    process = subprocess.Popen([sys.executable, "-m", "dgnet", "models"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait(300) == 141


def test_cost(capsys, monkeypatch):
    (row,) = json.loads(ask(capsys, "cost", "dg_resnet18", "--json"))
    assert set(row) == {
        "model",
        "image_size",
        "params",
        "multiply_adds",
        "linear_multiply_adds",
        "router_multiply_adds",
        "aggregation_multiply_adds",
        "activations",
        "paper_params",
        "paper_multiply_adds",
    }
    assert row["multiply_adds"] == 1_826_406_400
    assert row["linear_multiply_adds"] == 512_000
    assert json.loads(ask(capsys, "cost", "dg_resnet20", "--image-size", 64, 32, "--json"))[0]["image_size"] == [64, 32]
    for table, name in (("1", "dg_resnet18"), ("4", "dg_randwire_small")):  # not all rows: others recount them
        rows = tuple(row for row in TABLES[table].rows if row.model == name)
        monkeypatch.setitem(TABLES, table, replace(TABLES[table], rows=rows))
    assert "dg_resnet18" in ask(capsys, "cost")
    table = ask(capsys, "cost", "--table", 4)
    assert "dg_randwire_small" in table
    assert "ER and BA seem swapped" in table
