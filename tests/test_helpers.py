"""A mistake in these would leave tests out without a word."""

from __future__ import annotations

import ast
from itertools import combinations, product
from pathlib import Path

import pytest

from tests.helpers.pairs import all_pairs


@pytest.mark.parametrize("sizes", [(6, 3, 4, 2), (2, 2, 2, 2), (9, 2, 2), (1, 3)], ids=str)
def test_every_two_options_meet_in_a_row(sizes):
    rows = all_pairs(*sizes)
    for (one, ones), (other, others) in combinations(enumerate(sizes), 2):
        assert {(row[one], row[other]) for row in rows} == set(product(range(ones), range(others)))
    assert len(rows) < len(list(product(*map(range, sizes)))) or len(sizes) == 2


def test_no_test_module_imports_another():
    root = Path(__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tests":
                own = "tests.fuzz" if path.parent.name == "fuzz" else "tests.helpers"
                assert node.module.startswith(("tests.helpers", own)), f"{path.relative_to(root)} imports {node.module}"
