"""The table of docs/tools.md, its sections, the versions and the tests name the same tools."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.helpers.pages import blocks, read, split_sections
from tests.helpers.tools import PAGE

ROWS = re.findall(r"(?m)^\| \[[^]]+\]\(#([^)]+)\) \| (\S+) (\S+) \|", read(PAGE))
"""Of each tool: the anchor of its section, its package and the version."""


def normalise(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()


def test_the_versions_are_those_that_are_tested():
    pinned = {normalise(name): version for name, version in re.findall(r"(?m)^([\w.-]+)==(\S+)$", read("constraints.txt"))}
    assert len(ROWS) == 15
    for _, package, version in ROWS:
        assert pinned[normalise(package)] == version


def test_every_package_of_the_extra_has_a_row():
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    packages = {normalise(re.split("[<>=]", line)[0]) for line in extras["tools"]}
    assert packages - {"alembic", "sqlalchemy"} <= {normalise(package) for _, package, _ in ROWS}  # the two are for MLflow


def test_every_row_has_a_section_and_every_section_a_test():
    titles = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"): title for title in split_sections(read(PAGE)) if title}
    assert {anchor for anchor, _, _ in ROWS} == set(titles)
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    for title in titles.values():
        assert blocks(PAGE, "python", title) or blocks(PAGE, "yaml", title)
        assert f'"{title}"' in tests


def test_the_page_has_no_code_that_is_not_run():
    assert "<!-- not run" not in read(PAGE)
