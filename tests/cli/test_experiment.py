"""`dgnet experiment similarity` on a run. Grids are tested in tests/experiments."""

from __future__ import annotations

from tests.helpers.command import ask


def test_three_tables_about_a_run(capsys, run, images):
    tables = ask(capsys, "experiment", "similarity", run, "--data", images / "train", "--images", 12).strip().split("\n\n")
    assert [table.split("|")[3].strip() for table in tables] == [
        "next node, start",
        "open edges, %, start",
        "spread of a weight, start",
    ]
    for table in tables:
        _, _, *rows = table.splitlines()
        assert [row.split("|")[1:3] for row in rows] == [[f" {run.name} ", f" {stage} "] for stage in (1, 2, 3)]
