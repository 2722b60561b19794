from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import dgnet

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "page",
    [
        "docs/convert.md",
        "docs/extending.md",
        "docs/analysis.md",
        "docs/graph.md",
        "docs/inference.md",
        "docs/training.md",
        "README.md",
    ],
)
def test_the_code_on_the_page_runs(page):
    scope: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
        model = scope["model"].eval()
        with dgnet.record_connectivity(model) as record:
            model(torch.randn(2, 3, 32, 32))
        if "router=" in block:
            mask = model.stages[0].topology.mask
            assert record.alpha[0][:, mask].min() > 0.7  # the router's own start survives: edges start open


def test_every_option_of_the_page_exists_with_its_default():
    from dataclasses import fields

    rows = re.findall(r"^\| `(\w+)` \| (?:`?)([^`,|]+)", (ROOT / "docs/graph.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = {name: default.strip() for name, default in rows}
    defaults = {f.name: str(f.default).lower() for f in fields(dgnet.models.Connectivity)}
    assert documented == defaults
