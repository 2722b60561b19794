"""The files around the code agree: versions, dates, Python versions, and the commands that they name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from dgnet.documents import read_yaml

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
is_checkout = pytest.mark.skipif(not WORKFLOWS, reason="the source distribution has no workflows")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_and_date_stand_in_three_files_alike():
    citation = read_yaml(ROOT / "CITATION.cff")
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)
    assert (citation["version"], citation["date-released"]) == released[0]
    assert PROJECT["version"] == released[0][0]
    assert citation["license"] == PROJECT["license"]


def test_the_changelog_has_its_form():
    headings = re.findall(r"^(##+) (.*)$", read("CHANGELOG.md"), re.MULTILINE)
    versions = [title for level, title in headings if level == "##" and title not in ("[Unreleased]", "Past silent errors")]
    numbers = [
        tuple(map(int, re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d{2}-\d{2}", title).groups())) for title in versions
    ]
    dates = [title[-10:] for title in versions]
    assert numbers == sorted(numbers, reverse=True)
    assert dates == sorted(dates, reverse=True)
    assert {title for level, title in headings if level == "###"} <= {
        *("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"),
    }
    rows = re.findall(r"^\| (\d{4}-\d{2}-\d{2}) \| (.+?) \|", read("CHANGELOG.md"), re.MULTILINE)
    assert rows
    assert [date for date, _ in rows] == sorted((date for date, _ in rows), reverse=True)
    known = {".".join(map(str, number)) for number in numbers} | (
        {"unreleased"} if ("##", "[Unreleased]") in headings else set()
    )
    assert {version.split(",")[0] for _, version in rows} <= known


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", read(page)):
        assert (ROOT / target).exists(), target


@is_checkout
def test_workflows_run_on_the_supported_versions_of_python():
    supported = {line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    ci = read_yaml(ROOT / ".github" / "workflows" / "ci.yml")
    assert set(ci["jobs"]["fast"]["strategy"]["matrix"]["python"]) == supported
    assert set(ci["jobs"]) >= {"check", "fast", "slow", "oldest", "newest", "tools", "wheel", "docs"}
    for path in WORKFLOWS:
        for name, job in read_yaml(path)["jobs"].items():
            assert "timeout-minutes" in job, f"{path.name}: {name} may run for hours"


@is_checkout
def test_the_commands_that_are_named_exist():
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    texts = [read("CONTRIBUTING.md"), *(path.read_text(encoding="utf-8") for path in WORKFLOWS)]
    named = {
        word
        for text in texts
        for words in re.findall(r"(?:run: |`|^)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
        for word in words.split()
    }
    assert named >= {"check", "test", "test-slow", "test-oldest", "test-newest", "test-tools", "docs", "bench-check"}
    assert named <= targets


@is_checkout
@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_has_its_form(path):
    form = read_yaml(path)
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
    ids = [part["id"] for part in form["body"] if part["type"] != "markdown"]
    assert len(ids) == len(set(ids)) > 0
    for part in form["body"]:
        assert part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes")
        assert part["attributes"].get("label") or part["type"] == "markdown"


def test_hooks_use_the_tools_of_make_check():
    config = ROOT / ".pre-commit-config.yaml"
    if not config.exists():
        pytest.skip("the source distribution has no hooks")
    entries = {hook["entry"].split()[0] for repo in read_yaml(config)["repos"] for hook in repo["hooks"]}
    assert entries == {".venv/bin/ruff", ".venv/bin/mypy"}
