"""The examples run as they are shown."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
def test_the_demo_shows_cost_speed_and_paths(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "demo.py"))["main"](epochs=1)
    shown = capsys.readouterr().out
    for words in ("accuracy on the digits", "multiply-adds executed", "wirings", "images/s, sparse", "images/s, static"):
        assert words in shown
    page = Path(shown.partition("file://")[2].partition("\n")[0])
    assert page.is_file()
    assert list(page.parent.glob("*.png"))
